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
from milo.kernels.solver import calls
from milo.solve.grid import Grid, quantise
from milo.solve.lowrank import LowRank, fit_lowrank

WINDOW = 3
TOLERANCE = 1e-4
# Chosen on four matrices of a trained Mixtral at 11 and 21 rounds, see docs/log.md.
DITHER = 0.4
DITHER_SPAN = 0.9
# Noiseless rounds between two looks at whether anybody still goes on: each is a host sync.
LOOK_EVERY = 4


# Chooses scales and zeros for a target `[E, N, K]`.
GridSearch = Callable[[torch.Tensor, Encoding], Grid]


@dataclass
class Iterate:
    """The best round of every matrix of a stack.

    Attributes:
        codes: uint8 `[E, N, K]`.
        grid: scales and zeros.
        fit: factors, columns and rows beyond a matrix's own rank are zero.
        error: float64 `[E]`, `ε` of the kept round.
        rounds: int64 `[E]`, rounds that ran.
    """

    codes: torch.Tensor
    grid: Grid
    fit: LowRank
    error: torch.Tensor
    rounds: torch.Tensor

    def take(self, better: torch.Tensor, other: Iterate) -> None:
        """Replace the members for which `better [E]` holds, without asking the device which these are."""
        chosen = better[:, None, None]
        self.codes = torch.where(chosen, other.codes, self.codes)
        self.grid = Grid(
            torch.where(chosen, other.grid.scale, self.grid.scale), torch.where(chosen, other.grid.zero, self.grid.zero)
        )
        self.fit = LowRank(
            torch.where(chosen, other.fit.left, self.fit.left), torch.where(chosen, other.fit.right, self.fit.right)
        )
        self.error = torch.where(better, other.error, self.error)


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
        The best round of every matrix. A matrix that has stopped keeps what it has while the others go on.
    """
    device, width = weight.device, max(ranks)
    rank_of = torch.tensor(ranks, device=device)
    going = torch.ones(len(ranks), dtype=torch.bool, device=device)
    ran = torch.zeros(len(ranks), dtype=torch.int64, device=device)
    history: list[torch.Tensor] = []  # one [E] a noiseless round
    best, target, basis = None, weight, None
    if factors_first:
        start = fit_lowrank(weight, rank_of, width)
        target = weight - start.left @ start.right
        del start
    for number in range(1, rounds + 1):
        grid = search(target, encoding)
        codes, residual, norm = quantise(weight, target, grid, encoding)
        target = weight  # nobody needs the old one
        fit, basis = fit_lowrank(residual, rank_of, width, basis), None
        error = (norm.square() - fit.energy).clamp(min=0).sqrt()
        del residual
        ran += going
        now = Iterate(codes, grid, fit, error, ran)
        if best is None:
            best = now
        else:
            best.take(going & (error < best.error), now)

        amplitude = dither * max(0.0, 1 - number / (DITHER_SPAN * rounds))
        if amplitude == 0:
            history.append(error)
            if len(history) > WINDOW:
                going = going & ~_settled(history)
                if len(history) % LOOK_EVERY == 0 and not going.any():
                    break
        if number < rounds:
            basis = fit.basis
            target = next_target(weight, fit, grid, encoding, amplitude, number)
    assert best is not None
    return best


def next_target(
    weight: torch.Tensor, fit: LowRank, grid: Grid, encoding: Encoding, amplitude: float, number: int
) -> torch.Tensor:
    """`W − U·V`, plus uniform noise of `amplitude` steps; the same noise for every matrix, which need not know it."""
    if calls.usable(weight):
        product = fit.left.bfloat16() @ fit.right.bfloat16()
        return calls.retarget(weight, product, grid.scale, encoding.group_size, amplitude, number)
    target = weight - fit.left @ fit.right
    if amplitude:
        shape = weight.shape[1:]
        generator = torch.Generator(weight.device).manual_seed(number)
        draw = torch.rand(shape, generator=generator, device=weight.device).sub_(0.5).mul_(amplitude)
        for matrix, steps in zip(target, grid.scale, strict=True):
            matrix.addcmul_(draw, steps.repeat_interleave(encoding.group_size, -1)[:, : shape[1]])
    return target


def _settled(history: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 15 for every matrix: the windowed error improved by less than the tolerance."""
    if len(history) < WINDOW + 1:
        return torch.zeros(history[-1].shape, dtype=torch.bool, device=history[-1].device)
    now = torch.stack(history[-WINDOW:]).mean(0)
    before = torch.stack(history[-WINDOW - 1 : -1]).mean(0)
    return (before - now) <= TOLERANCE * before  # "or equal" for an error of 0
