"""HQQ's half-quadratic step: for fixed scales, the zeros that minimise a sparse norm of the error (p < 1).

The problem (Eq. 4-5) is split by an auxiliary variable `M` that takes the outliers of the error:

    min_{z, M}  ‖M‖_p + (β/2) ‖M − (T − Ŵ_z)‖²

and both halves have closed forms: `M = shrink(T − Ŵ)` (Eq. 6-7) and `z = mean(code − (T − M)/s)` (Eq. 8). In units
of codes, with `e = T/s + z − code` the rounding error, the two collapse into one update a group,

    z ← z − mean( sign(e) · min(|e|, s^{p−2} |e|^{p−1} / β) ),

which is what this file computes. The second argument of `min` is smaller only for errors beyond
`(s^{p−2}/β)^{1/(2−p)}`, which clipped weights alone can reach at the usual scales: so the power is taken for those
few groups and nothing else. Constants are HQQ's (and MiLo's code's): p = 0.7, β₀ = 10, κ = 1.01, 20 steps at most,
a matrix stops when its mean absolute error no longer falls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from milo.format.matrix import Encoding
from milo.kernels.solver import calls
from milo.solve.grid import MAX_ZERO, Grid, group_counts, minmax_grid, round_zero, to_groups

P_NORM = 0.7
BETA = 10.0
KAPPA = 1.01
STEPS = 20

# On a CPU the passes of one step run over blocks that stay in the cache. Fixed, because the block size decides the
# order of summation and so the last bits of the result.
_CPU_BLOCK = 1 << 17


def hqq_grid(target: torch.Tensor, encoding: Encoding) -> Grid:
    """The min-max grid of `target` with optimised zeros: HQQ's grid search, one pass over the weights on a GPU."""
    if calls.usable(target) and encoding.scale_bits == 16:
        return fused(target, None, encoding)
    return half_quadratic(target, minmax_grid(target, encoding), encoding)


def fused(target: torch.Tensor, start: Grid | None, encoding: Encoding) -> Grid:
    """`half_quadratic` by the kernel, from `start` or (fp16 scales) from the min-max grid of `target`."""
    given = (start.scale, start.zero) if start else None
    scale, zero = calls.half_quadratic(
        target, given, encoding, max_zero=MAX_ZERO, steps=STEPS, beta=BETA, kappa=KAPPA, p_norm=P_NORM
    )
    return Grid(scale, round_zero(zero, encoding))


def half_quadratic(target: torch.Tensor, grid: Grid, encoding: Encoding) -> Grid:
    """Optimise the zeros of `grid` for `target`.

    Args:
        target: float32 `[E, N, K]`.
        grid: start, usually `minmax_grid`; its scales are kept.
        encoding: widths and group size.

    Returns:
        A grid with the same scales and the new zeros, rounded to their stored form.
    """
    if calls.usable(target):
        return fused(target, grid, encoding)
    stack, rows, in_features = target.shape
    size, groups = encoding.group_size, grid.scale.shape[-1]
    counts = group_counts(in_features, size, target.device)
    tail = groups * size - in_features

    scale = grid.scale.reshape(stack * rows, groups)
    zero = grid.zero.reshape(stack * rows, groups).clone()
    codes_unit = to_groups(target, size).reshape(stack * rows, groups, size) / scale[..., None]

    active = torch.ones(stack, dtype=torch.bool, device=target.device)
    best = torch.full((stack,), torch.inf, device=target.device)
    beta = BETA
    for _ in range(STEPS):
        error = torch.zeros(stack, device=target.device)
        for block, members in _blocks(stack, rows, groups * size, active):
            shift, absolute = _step(codes_unit[block], scale[block], zero[block], encoding.max_code, beta, tail)
            shift /= counts
            if members.stop - members.start > 1:  # several matrices at once: those that have stopped stand still
                shift = shift.view(stack, rows, groups).mul_(active[:, None, None]).view(-1, groups)
            zero[block] -= shift
            error[members] += absolute.view(members.stop - members.start, -1).sum(-1)
        active &= error < best
        best = torch.where(active, error, best)
        if not active.any():
            break
        beta *= KAPPA
    return Grid(grid.scale, round_zero(zero.view_as(grid.zero), encoding))


def _step(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: int, beta: float, tail: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of a block: the sum of the shrunk errors and the absolute error, both a group `[R, G]`."""
    error = x + zero[..., None]
    error -= error.round().clamp_(0, max_code)
    if tail:  # columns that only fill up the last group
        error[:, -1, x.shape[-1] - tail :] = 0
    magnitude = error.abs()
    total = magnitude.sum(-1) * scale
    shift = error.sum(-1)

    factor = scale.pow(P_NORM - 2).div_(beta)
    outliers = magnitude.amax(-1) > factor.pow(1 / (2 - P_NORM))
    if outliers.any():
        bound = magnitude[outliers].pow(P_NORM - 1).mul_(factor[outliers][:, None])
        shrunk = torch.minimum(magnitude[outliers], bound).copysign(error[outliers])
        shift[outliers] = shrunk.sum(-1)
    return shift, total


def _blocks(stack: int, rows: int, width: int, active: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Row ranges of the flattened stack to work on, each with the matrices it belongs to."""
    if active.device.type != "cpu":
        yield slice(0, stack * rows), slice(0, stack)
        return
    step = max(1, _CPU_BLOCK // width)
    for member in active.nonzero().flatten().tolist():
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield slice(member * rows + first, member * rows + last), slice(member, member + 1)
