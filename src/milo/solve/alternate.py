"""MiLo's alternation (Algorithm 1 of the paper): codes for what the compensator leaves, a compensator for what the
codes leave, until the error no longer falls.

Round t quantises `W − U^{t−1}V^{t−1}` (with `U⁰V⁰ = 0`) and refits `U, V` to the residual `W − Ŵ^t`. The error
`ε_t = ‖W − Ŵ^t − U^tV^t‖_F` (Eq. 14) need not fall monotonically, so it is averaged over a sliding window of three
rounds and the loop ends when the average improves by less than 1e-4 (Eq. 15), which a diverging error satisfies
too. The best round is kept. The official code has neither the rule nor the keeping: it runs a fixed number of
rounds and returns the last.

With an exact fit this alternation gets stuck: as soon as U·V moves by less than half a step, no code changes any
more (measured: at 21 rounds 4 % *above* the official code, whose sloppy randomised SVD keeps it moving). So the
target is dithered: uniform noise of `DITHER` quantisation steps, falling linearly to nothing over the first
`DITHER_SPAN` of the rounds, as in simulated annealing. It costs one addition a round and ends 1 to 2 % below the
official code. Eq. 15 is consulted only once the noise is gone, since noise makes ε jump. `dither=0` is the
paper's plain loop.

The paper starts from `U⁰V⁰ = 0`. The residual of a 3-bit grid is nearly white even where the weights are not, so the
first compensator finds little, and the alternation never leaves the neighbourhood of that start. `factors_first` takes
the weights' own leading directions out before the first codes are chosen: what remains has a smaller range, and one
round from there beats twenty from nothing wherever the weights have leading directions at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from milo.format.matrix import Encoding
from milo.solve.grid import Grid, decode, encode
from milo.solve.lowrank import fit_lowrank

WINDOW = 3
TOLERANCE = 1e-4
# Chosen on four matrices of a trained Mixtral at 11 and 21 rounds, see docs/log.md.
DITHER = 0.4
DITHER_SPAN = 0.9
_SEED = 0


# Chooses scales and zeros for a target `[E, N, K]`.
GridSearch = Callable[[torch.Tensor, Encoding], Grid]


@dataclass
class Iterate:
    """The best round of every matrix of a stack.

    Attributes:
        codes: uint8 `[E, N, K]`.
        grid: scales and zeros.
        u: float32 `[E, N, r]`, columns beyond a matrix's own rank are zero.
        v: float32 `[E, r, K]`, likewise.
        error: float64 `[E]`, `ε` of the kept round.
        rounds: int64 `[E]`, rounds that ran.
    """

    codes: torch.Tensor
    grid: Grid
    u: torch.Tensor
    v: torch.Tensor
    error: torch.Tensor
    rounds: torch.Tensor


def alternate(
    weight: torch.Tensor,
    ranks: list[int],
    search: GridSearch,
    encoding: Encoding,
    rounds: int,
    dither: float = DITHER,
    factors_first: bool = False,
) -> Iterate:
    """Solve for codes and compensators together.

    Args:
        weight: float32 `[E, N, K]`.
        ranks: rank of each matrix, at least 1 each.
        search: how a grid is found for a target.
        encoding: widths and group size.
        rounds: solves at most (the official code's `iter = n` is `n + 1` of them).
        dither: amplitude of the annealed noise in quantisation steps, 0 for none.
        factors_first: start from the best factors of the weights themselves (`U⁰V⁰ ≈ W`) instead of from nothing.

    Returns:
        The best round of every matrix; a matrix that has stopped costs nothing afterwards.
    """
    stack, out_features, in_features = weight.shape
    device, top_rank = weight.device, max(ranks)
    rank_of = torch.tensor(ranks, device=device)
    kept = torch.arange(top_rank, device=device) < rank_of[:, None]  # [E, r]

    best = Iterate(
        codes=torch.zeros(weight.shape, dtype=torch.uint8, device=device),
        grid=Grid(*(torch.zeros(stack, out_features, encoding.groups(in_features), device=device) for _ in "sz")),
        u=torch.zeros(stack, out_features, top_rank, device=device),
        v=torch.zeros(stack, top_rank, in_features, device=device),
        error=torch.full((stack,), torch.inf, dtype=torch.float64, device=device),
        rounds=torch.zeros(stack, dtype=torch.int64, device=device),
    )
    history: list[torch.Tensor] = []  # one [E] a noiseless round; NaN where a matrix had stopped
    noise = torch.Generator(device).manual_seed(_SEED)
    alive = torch.arange(stack, device=device)
    work, target, basis = weight, weight, None
    if factors_first:
        start = fit_lowrank(weight, top_rank)
        target = weight - (start.u * kept[:, None]) @ start.v
    for number in range(1, rounds + 1):
        grid = search(target, encoding)
        codes = encode(target, grid, encoding)
        residual = work - decode(codes, grid, encoding)
        fit = fit_lowrank(residual, top_rank, basis)
        keep = kept[alive]
        u, v = fit.u * keep[:, None], fit.v * keep[..., None]

        explained = (fit.energy * keep).sum(-1, dtype=torch.float64)
        norm = torch.linalg.vector_norm(residual, dim=(1, 2)).double()
        error = (norm.square() - explained).clamp(min=0).sqrt()
        best.rounds[alive] = number
        better = error < best.error[alive]
        winners = alive[better]
        best.codes[winners], best.error[winners] = codes[better], error[better]
        best.grid.scale[winners], best.grid.zero[winners] = grid.scale[better], grid.zero[better]
        best.u[winners], best.v[winners] = u[better], v[better]

        amplitude = dither * max(0.0, 1 - number / (DITHER_SPAN * rounds))
        basis, scale = fit.basis, grid.scale
        if amplitude == 0:
            history.append(torch.full((stack,), torch.nan, dtype=torch.float64, device=device))
            history[-1][alive] = error
            going = ~_settled(history)[alive]
            if not going.any():
                break
            if not going.all():
                alive, work, u, v = alive[going], work[going], u[going], v[going]
                basis = basis[going] if basis is not None else None
        if number < rounds:
            target = work - u @ v
            if amplitude:
                _dither(target, scale, encoding, amplitude, noise)
    return best


def _dither(
    target: torch.Tensor, scale: torch.Tensor, encoding: Encoding, amplitude: float, noise: torch.Generator
) -> None:
    """Add uniform noise of `amplitude` steps in place; the same noise for every matrix, which need not know it."""
    shape = target.shape[1:]
    draw = torch.rand(shape, generator=noise, device=target.device).sub_(0.5).mul_(amplitude)
    for matrix, steps in zip(target, scale, strict=True):
        matrix.addcmul_(draw, steps.repeat_interleave(encoding.group_size, -1)[:, : shape[1]])


def _settled(history: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 15 for every matrix: the windowed error improved by less than the tolerance."""
    if len(history) < WINDOW + 1:
        return torch.zeros(history[-1].shape, dtype=torch.bool, device=history[-1].device)
    now = torch.stack(history[-WINDOW:]).mean(0)
    before = torch.stack(history[-WINDOW - 1 : -1]).mean(0)
    return (before - now) <= TOLERANCE * before  # "or equal" for an error of 0
