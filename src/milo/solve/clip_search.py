"""The grid of least squared error: scale and zero of every group searched together, both ends free to clip.

A round-to-nearest grid spends its first and last level on the group's two largest weights. At 3 bits it is better
to clip both ends and have finer steps in between; which end, and by how much, differs from group to group. Given
the codes the best scale and zero are a linear regression of the weights on their codes,

    s = cov(w, c) / var(c),    z = mean(c) − mean(w) / s,    error = n · (var(w) − cov(w, c)² / var(c)),

so the error of a choice of codes is known without decoding anything. The search is therefore:

1. nine starts, each end of the range clipped by 0, 1 or 2 units; each is encoded once and judged by the error of
   its regression;
2. the best two alternate between codes and regression a few times (Lloyd's algorithm for a uniform quantiser);
3. the winner is rounded to its stored form *with the rounding in the loop*: 6- and 8-bit scales try both
   neighbouring fractions of the row's super-scale, each with the zero that suits it, and the error that decides is
   that of the stored numbers;
4. every row is scaled so that it is unbiased (below);
5. where the round-to-nearest grid is still better (groups that it represents exactly), it is taken.

**Bias.** Values of least squared error are shorter than what they stand for: like every conditional mean they are
orthogonal to their error, `⟨ŵ, w − ŵ⟩ = 0`, so that `⟨ŵ, w⟩ = (1 − ρ²)‖w‖²` at a relative squared error ρ². Noise of
different matrices adds up in squares, but this shrinkage has one sign everywhere: at 3 bits every matrix of the model
is 2 to 3 % weaker along itself. So a row's scales are multiplied by `‖w‖² / ⟨ŵ, w⟩`, and the codes are then the nearest
on the new grid. That undoes a third to a half of the scaling, which is as well: the whole of it costs the ρ²-th part
of the squared error, and measured divergences are lowest in between.

**Importance.** Where it is known how much the in-features matter, every sum above is weighted by it.

Measured (docs/log.md): within 1 % of an exhaustive search at 3 and 4 bits, 12 to 21 % below HQQ's squared error, in
0.7 to 1.15 times HQQ's time on a CPU; scaling rows lowers the divergence of whole models by 4 to 11 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from milo.format.matrix import Encoding
from milo.solve.grid import Grid, group_counts, minmax_grid, round_scale, round_zero, to_groups

# A start clips an end by 0, 1 or 2 units of this fraction of its distance from the mean: 0.1 at 3 bits.
_CLIP_UNIT = 0.8
_KEPT = 2  # starts that are refined
_REFITS = 3
# fp16 holds a zero of this size to a quarter of a code.
_MAX_ZERO = 512.0
# On a CPU the passes of one search run over blocks that stay in the cache; on a GPU the block bounds memory. Fixed,
# so that results do not depend on the machine.
_CPU_BLOCK = 1 << 19
_GPU_BLOCK = 1 << 24


@dataclass
class _Groups:
    """Groups of some rows, centred: `x [R, G, size]` (columns that fill up a short last group are 0).

    All sums over a group are weighted by `weight`, whose mean over a group is 1; `share` is what the group weighs among
    those of its row.
    """

    x: torch.Tensor
    mean: torch.Tensor  # [R, G]
    square: torch.Tensor  # [R, G], sum of x²
    counts: torch.Tensor  # [G]
    tail: int
    encoding: Encoding
    weight: torch.Tensor | None  # [R or 1, G, size]
    share: torch.Tensor  # [R or 1, G]

    def codes(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest codes as floats; `zero` is that of the centred weights."""
        codes = (self.x * (1 / scale)[..., None]).add_(zero[..., None])
        codes.round_().clamp_(0, self.encoding.max_code)
        return self._cut(codes)

    def regress(self, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One Lloyd step: scale and zero fitted to the nearest codes, and the error of that fit, all `[R, G]`."""
        codes = self.codes(scale, zero)
        weighted = codes if self.weight is None else codes * self.weight
        mean = weighted.sum(-1) / self.counts
        variance = torch.linalg.vecdot(weighted, codes) - mean.square() * self.counts
        covariance = weighted.mul_(self.x).sum(-1)
        usable = (variance > 1e-3) & (covariance > 0)  # else every weight has the same code
        fitted = torch.where(usable, covariance / variance.clamp(min=1e-3), scale)
        error = torch.where(usable, self.square - covariance * fitted, self.square)
        zero = torch.where(usable, mean, zero)
        if self.encoding.zero_bits < 16:
            return self._reachable(fitted, zero, error, mean, variance, covariance)
        return fitted, zero, error

    def _reachable(
        self,
        scale: torch.Tensor,
        zero: torch.Tensor,
        error: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        covariance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the fitted zero lies outside the code range: the nearest one inside, and the scale fitted to that.

        With `d = mean(c) − z` the regression through a fixed zero is `s = (cov + n·mean(w)·d) / (var + n·d²)`.
        """
        wanted = zero - self.mean / scale
        bound = wanted.clamp(0, self.encoding.max_code)
        distance = mean - bound
        product = covariance + self.counts * self.mean * distance
        norm = variance + self.counts * distance.square()
        usable = (product > 0) & (norm > 1e-3)
        through = torch.where(usable, product / norm.clamp(min=1e-3), scale)
        outside = wanted != bound
        total = self.square + self.counts * self.mean.square()
        return (
            torch.where(outside, through, scale),
            torch.where(outside, bound + self.mean / through, zero),
            torch.where(outside, torch.where(usable, total - product * through, total), error),
        )

    def centre(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The zero that suits the nearest codes on a scale."""
        codes = self.codes(scale, zero)
        return (codes if self.weight is None else codes.mul_(self.weight)).sum(-1) / self.counts

    def stored(self, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rounded zero (of the weights themselves) for a stored scale, and the squared error of the pair."""
        rounded = round_zero(zero - self.mean / scale, self.encoding)
        return rounded, _square(self._decoded(scale, rounded).sub_(self.x), self.weight)

    def gain(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """`‖w‖² / ⟨ŵ, w⟩` of every row on a stored grid, `[R, 1]`; within a factor 2 for rows that make no sense."""
        decoded = self._decoded(scale, zero)
        if self.weight is not None:
            decoded.mul_(self.weight)
        constant = self.counts * self.mean.square()
        along = self.mean * decoded.sum(-1) + decoded.mul_(self.x).sum(-1) + constant
        along, whole = ((part * self.share).sum(-1, keepdim=True) for part in (along, self.square + constant))
        return torch.where(along > 0, whole / along, 1.0).clamp(0.5, 2.0)

    def _decoded(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What a stored grid makes of `x`."""
        centred = zero + self.mean / scale
        return self._cut(self.codes(scale, centred).sub_(centred[..., None]).mul_(scale[..., None]))

    def _cut(self, values: torch.Tensor) -> torch.Tensor:
        if self.tail:
            values[:, -1, -self.tail :] = 0
        return values


def _square(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Sum of squares over the last dimension."""
    if weight is None:
        return torch.linalg.vector_norm(values, dim=-1).square_()
    return values.square_().mul_(weight).sum(-1)


def mse_grid(
    target: torch.Tensor, encoding: Encoding, importance: torch.Tensor | None = None, unbiased: bool = True
) -> Grid:
    """Scales and zeros of least squared error, then scaled until no row is biased.

    Args:
        target: float32 `[E, N, K]`.
        encoding: widths and group size.
        importance: float32 `[E, K]`, positive weights of the in-features' squared errors; all alike without.
        unbiased: whether rows are scaled.

    Returns:
        The grid, rounded to its stored form. With 16-bit scales no group, and with narrower ones no row, has a larger
        (weighted) squared error than on `minmax_grid`.
    """
    stack, rows, in_features = target.shape
    groups = encoding.groups(in_features)
    scale = torch.empty(stack * rows, groups, device=target.device)
    zero = torch.empty_like(scale)
    flat = target.reshape(1, stack * rows, in_features)
    for block in _blocks(stack * rows, in_features, target.device):
        weight = None
        if importance is not None:
            weight = importance[torch.arange(block.start, block.stop, device=target.device) // rows]
        found = _search(flat[:, block], encoding, weight, unbiased)
        scale[block], zero[block] = found.scale[0], found.zero[0]
    return Grid(scale.view(stack, rows, groups), zero.view(stack, rows, groups))


def _blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    step = max(1, (_CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK) // width)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _search(target: torch.Tensor, encoding: Encoding, weight: torch.Tensor | None, unbiased: bool) -> Grid:
    """Grid of a block of rows `[1, R, K]` whose weights are `weight [R, K]`."""
    groups = _centre(target, encoding, weight)
    scale, zero = _refine(groups, *_starts(groups))
    if encoding.scale_bits == 16:
        scale = round_scale(scale, encoding)
        zero, _ = groups.stored(scale, zero)
    else:
        scale, zero = _neighbours(groups, scale, zero)
    if unbiased:
        scale = round_scale(scale * groups.gain(scale, zero), encoding)
    error = groups.stored(scale, zero + groups.mean / scale)[1]

    plain = minmax_grid(target, encoding)
    plain_scale, plain_zero = plain.scale[0], plain.zero[0]
    plain_error = groups.stored(plain_scale, plain_zero + groups.mean / plain_scale)[1]
    worse = plain_error < error
    if encoding.scale_bits < 16:  # the groups of a row share a super-scale, so the row is taken as a whole
        worse = ((plain_error - error) * groups.share).sum(-1, keepdim=True).expand_as(worse) < 0
    return Grid(torch.where(worse, plain_scale, scale)[None], torch.where(worse, plain_zero, zero)[None])


def _centre(target: torch.Tensor, encoding: Encoding, importance: torch.Tensor | None) -> _Groups:
    size, in_features = encoding.group_size, target.shape[-1]
    counts = group_counts(in_features, size, target.device)
    tail = -in_features % size
    x, weight, share = to_groups(target, size)[0], None, torch.ones_like(counts)[None]
    if tail:
        x[:, -1, -tail:] = 0
    if importance is not None:
        weight = to_groups(importance[None], size)[0]
        if tail:
            weight[:, -1, -tail:] = 0
        share = weight.sum(-1) / counts
        weight = weight / share[..., None]
    mean = (x if weight is None else x * weight).sum(-1) / counts
    x = x - mean[..., None]
    if tail:
        x[:, -1, -tail:] = 0
    square = _square(x if weight is None else x.clone(), weight)
    return _Groups(x, mean, square, counts, tail, encoding, weight, share)


def _starts(groups: _Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """The `_KEPT` best of the clipped ranges, each after one regression: scales and zeros `[_KEPT, R, G]`."""
    encoding = groups.encoding
    low, high = groups.x.amin(-1), groups.x.amax(-1)
    if encoding.zero_bits < 16:  # such a zero lies inside the code range, so the grid must reach 0
        low, high = torch.minimum(low, -groups.mean), torch.maximum(high, -groups.mean)
    # A group of one value has no range, and a narrow one far from 0 would need a zero that fp16 cannot hold.
    floor = torch.maximum((high - low) / 8, groups.mean.abs() / _MAX_ZERO).clamp(min=2.0**-24) / encoding.max_code
    unit = _CLIP_UNIT / 2**encoding.bits
    found = []
    for lower, upper in product((1.0, 1 - unit, 1 - 2 * unit), repeat=2):
        scale = torch.maximum((high * upper - low * lower) / encoding.max_code, floor)
        found.append(groups.regress(scale, -low * lower / scale))
    scales, zeros, errors = (torch.stack(part) for part in zip(*found, strict=True))
    kept = errors.topk(_KEPT, dim=0, largest=False).indices
    return scales.gather(0, kept), zeros.gather(0, kept)


def _refine(groups: _Groups, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd steps from every start; the best scale and zero `[R, G]`."""
    best, scale_kept, zero_kept = torch.full_like(scales[0], torch.inf), scales[0], zeros[0]
    for scale, zero in zip(scales, zeros, strict=True):
        for _ in range(_REFITS):
            scale, zero, error = groups.regress(scale, zero)
            better = error < best
            best = torch.where(better, error, best)
            scale_kept = torch.where(better, scale, scale_kept)
            zero_kept = torch.where(better, zero, zero_kept)
    return scale_kept, zero_kept


def _neighbours(groups: _Groups, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The better of the two stored scales on either side of the wanted one, with its zero."""
    encoding = groups.encoding
    largest, top_code = scale.amax(-1, keepdim=True), 2**encoding.scale_bits - 1
    step = largest.half().float().clamp(min=2.0**-24) * encoding.scale_step
    best = torch.full_like(scale, torch.inf)
    scale_kept, zero_kept = scale, zero
    # The largest scale of a row keeps the largest code: it is the super-scale.
    lower = torch.where(scale == largest, top_code, (scale / step).floor())
    for candidate in (lower, lower + 1):
        stored = candidate.clamp(1, top_code) * step
        rounded, error = groups.stored(stored, groups.centre(stored, zero))
        better = error < best
        best = torch.where(better, error, best)
        scale_kept = torch.where(better, stored, scale_kept)
        zero_kept = torch.where(better, rounded, zero_kept)
    return scale_kept, zero_kept
