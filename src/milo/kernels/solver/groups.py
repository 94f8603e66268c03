"""Triton kernels over groups of weights.

A program owns `BLOCK` consecutive groups of one matrix of the stack (grid: blocks of groups × members), one tile
`[BLOCK, SIZE]` in registers. Whatever is summed beyond a group is written as one partial sum a program and added up
in a fixed order afterwards, so results do not depend on scheduling: no atomics.

Roofline, H100 (3.35 TB/s, 132 SMs × 128 lanes × about 1.7 GHz = 29 T instructions/s), a weight and a round:

| kernel | bytes | instructions |
|---|---|---|
| `search` (range, 20 half-quadratic steps) | 4 read, 1.4 written | about 280, bound by these |
| `quantise` (codes, residual, its norm) | 8 read, 3 written | 15 |
| `retarget` (`W − U·V` + noise) | 6 read, 4 written | 35 |
| the two products with the residual and `U·V` (cuBLAS, bfloat16) | 6 | – |

`quantise` is not fused with the first product `R·B` that follows: it would save one read of 2 bytes of some 33, and
cost a program per block of rows that walks along the whole row, which for one matrix is too few programs to fill the
machine, or a split of the sum and another pass for it.

Rounding is to the nearest, ties to even, by adding and subtracting 1.5·2²³: exact for the clamped values here.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TINY = tl.constexpr(2.0**-24)
_MAGIC = tl.constexpr(12582912.0)
# Triton compiles a kernel anew where such an argument is 1 or a multiple of 16. None of these addresses wide accesses.
_COUNTS = ["n_groups", "groups"]


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _half(x):  # type: ignore[no-untyped-def]
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _place(n_groups, groups, in_features, SIZE: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Group indices, element offsets and the mask of a program's tile, all within its matrix."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, SIZE)
    live = index < n_groups
    if RAGGED:
        row = index // groups
        column = (index - row * groups) * SIZE
        offset = (row.to(tl.int64) * in_features + column)[:, None] + lane[None, :]
        inside = live[:, None] & (column[:, None] + lane[None, :] < in_features)
        count = tl.minimum(in_features - column, SIZE).to(tl.float32)
    else:
        offset = (index.to(tl.int64) * SIZE)[:, None] + lane[None, :]
        inside = live[:, None] & (lane[None, :] < SIZE)
        count = tl.full([BLOCK], SIZE, tl.float32)
    return index, offset, inside, live, count


@triton.jit(do_not_specialize=_COUNTS)
def search(  # type: ignore[no-untyped-def]
    target,  # float32 [E, N, K]
    scale,  # float32 [E, N, G]: read, or written if START
    zero,  # float32 [E, N, G]: read, or the starting zeros written if START
    zeros,  # float32 [E, STEPS, N, G]: the zeros after each step
    errors,  # float32 [E, STEPS, programs]: absolute errors before each step
    n_groups,  # N·G
    groups,  # G
    in_features,  # K
    size_of_member,  # N·K, int64
    zero_step,  # distance of two zeros if ZERO_TOP > 0
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    MAX_CODE: tl.constexpr,
    ZERO_TOP: tl.constexpr,  # largest zero code, 0 for fp16 zeros
    START: tl.constexpr,
    STEPS: tl.constexpr,
    BETA: tl.constexpr,
    KAPPA: tl.constexpr,
    SHRINK: tl.constexpr,  # κ^(−1/(2−p)), what `limit` loses a step
    P_NORM: tl.constexpr,
    MAX_ZERO: tl.constexpr,
):
    """A grid for every group: the min-max grid (`START`), then every half-quadratic step (`STEPS`).

    The stop rule is a matrix's and not a group's, so all steps are taken and recorded; the caller picks.
    """
    member = tl.program_id(1).to(tl.int64)
    index, offset, inside, live, count = _place(n_groups, groups, in_features, SIZE, BLOCK, RAGGED)
    x = tl.load(target + member * size_of_member + offset, mask=inside, other=0.0)
    at = member * n_groups + index
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.where(live, high, 0.0)
    low = tl.where(live, low, 0.0)
    if START:
        reach, floor = high, low
        if ZERO_TOP > 0:
            reach, floor = tl.maximum(high, 0.0), tl.minimum(low, 0.0)
        magnitude = tl.maximum(tl.abs(floor), tl.abs(reach))
        span = reach - floor
        s = tl.maximum(tl.math.div_rn(span, MAX_CODE * 1.0), magnitude * (1.0 / MAX_ZERO))
        s = tl.where(span == 0, tl.where(magnitude == 0, 1.0, magnitude), s)
        s = tl.maximum(_half(s), _TINY)
        z = tl.math.div_rn(-floor, s)
        if ZERO_TOP > 0:
            z = tl.minimum(tl.maximum(_round(tl.math.div_rn(z, zero_step + tl.zeros_like(z))), 0.0), ZERO_TOP * 1.0)
            z = z * zero_step
        else:
            z = _half(tl.minimum(tl.maximum(z, -65504.0), 65504.0))
        tl.store(scale + at, s, mask=live)
        tl.store(zero + at, z, mask=live)
    else:
        s = tl.load(scale + at, mask=live, other=1.0)
        z = tl.load(zero + at, mask=live, other=0.0)
    if STEPS > 0:
        x = tl.math.div_rn(x, tl.broadcast_to(s[:, None], x.shape))
        top, bottom = tl.math.div_rn(high, s), tl.math.div_rn(low, s)
        portion = tl.math.div_rn(tl.full([BLOCK], 1.0, tl.float32), count)
        # Beyond `limit` an error is shrunk; both follow the growing β.
        factor = tl.exp2((P_NORM - 2.0) * tl.log2(s)) * (1.0 / BETA)
        limit = tl.exp2(tl.log2(factor) * (1.0 / (2.0 - P_NORM)))
        for step in range(STEPS):
            error = x + z[:, None]
            error -= _round(tl.minimum(tl.maximum(error, 0.0), MAX_CODE * 1.0))
            if RAGGED:
                error = tl.where(inside, error, 0.0)
            size = tl.abs(error)
            shift = tl.sum(error, 1)
            # Inside the range an error is at most half a code; for those beyond, the group's extremes tell.
            clipped = tl.maximum(top + z - MAX_CODE, -bottom - z)
            outlier = live & ((clipped > limit) | (limit < 0.5))
            if tl.max(outlier.to(tl.int32), 0) > 0:
                bound = tl.exp2((P_NORM - 1.0) * tl.log2(size)) * factor[:, None]
                shrunk = tl.minimum(size, bound)
                shift = tl.where(outlier, tl.sum(tl.where(error < 0, -shrunk, shrunk), 1), shift)
            # Dead groups hold zeros on a grid of scale 1 and zero 0: their errors are 0.
            total = tl.sum(size * s[:, None])
            z -= shift * portion
            place = member * STEPS + step
            tl.store(zeros + place * n_groups + index, z, mask=live)
            tl.store(errors + place * tl.num_programs(0) + tl.program_id(0), total)
            factor *= 1.0 / KAPPA
            limit *= SHRINK


@triton.jit(do_not_specialize=_COUNTS)
def quantise(  # type: ignore[no-untyped-def]
    target,  # float32 [E, N, K]
    weight,  # float32 [E, N, K]
    scale,  # float32 [E, N, G]
    zero,  # float32 [E, N, G]
    codes,  # uint8 [E, N, K], written
    residual,  # float32 or bfloat16 [E, N, K], written if KEEP
    squares,  # float32 [E, programs], written: squares of the residual
    n_groups,
    groups,
    in_features,
    size_of_member,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    MAX_CODE: tl.constexpr,
    KEEP: tl.constexpr,
    SAME: tl.constexpr,  # `weight` is `target`
):
    """Nearest codes of `target`, and what they leave of `weight`."""
    member = tl.program_id(1).to(tl.int64)
    index, offset, inside, live, _ = _place(n_groups, groups, in_features, SIZE, BLOCK, RAGGED)
    base = member * size_of_member
    at = member * n_groups + index
    s = tl.load(scale + at, mask=live, other=1.0)[:, None]
    z = tl.load(zero + at, mask=live, other=0.0)[:, None]
    x = tl.load(target + base + offset, mask=inside, other=0.0)
    code = tl.math.div_rn(x, tl.broadcast_to(s, x.shape)) + z
    code = _round(tl.minimum(tl.maximum(code, 0.0), MAX_CODE * 1.0))
    tl.store(codes + base + offset, code.to(tl.uint8), mask=inside)
    if not SAME:
        x = tl.load(weight + base + offset, mask=inside, other=0.0)
    left = tl.where(inside, x - (code - z) * s, 0.0)
    if KEEP:
        tl.store(residual + base + offset, left.to(residual.dtype.element_ty), mask=inside)
    tl.store(squares + member * tl.num_programs(0) + tl.program_id(0), tl.sum(left * left))


@triton.jit(do_not_specialize=[*_COUNTS, "seed"])
def retarget(  # type: ignore[no-untyped-def]
    weight,  # float32 [E, N, K]
    product,  # any float [E, N, K]
    scale,  # float32 [E, N, G]
    target,  # float32 [E, N, K], written
    n_groups,
    groups,
    in_features,
    size_of_member,
    amplitude,
    seed,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    NOISE: tl.constexpr,
):
    """`weight − product`, plus uniform noise of `amplitude` steps that depends on seed, row and column only."""
    member = tl.program_id(1).to(tl.int64)
    base = member * size_of_member
    quarter: tl.constexpr = SIZE // 4
    index, offset, inside, live, _ = _place(n_groups, groups, in_features, SIZE, BLOCK, RAGGED)
    if NOISE:
        # One call of the generator gives four numbers: one for each quarter of a group.
        lane = tl.arange(0, quarter)
        draws = tl.rand4x(seed, index[:, None] * quarter + lane[None, :])
        steps = tl.load(scale + member * n_groups + index, mask=live, other=0.0)[:, None] * amplitude
        row = index // groups
        column = (index - row * groups) * SIZE
        for part in tl.static_range(4):
            at = column[:, None] + lane[None, :] + part * quarter
            where = base + row.to(tl.int64)[:, None] * in_features + at
            real = live[:, None] & (at < in_features)
            x = tl.load(weight + where, mask=real, other=0.0)
            x -= tl.load(product + where, mask=real, other=0.0).to(tl.float32)
            tl.store(target + where, x + (draws[part] - 0.5) * steps, mask=real)
    else:
        x = tl.load(weight + base + offset, mask=inside, other=0.0)
        x -= tl.load(product + base + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + base + offset, x, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def round_rows(  # type: ignore[no-untyped-def]
    rows,  # float32 [R, L]
    fractions,  # float32 [C]
    codes,  # uint8 [R, L], written
    scales,  # float16 [R, G], written
    n_groups,
    groups,
    length,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Codes and signed scales of least squared error for factor rows: every candidate in registers."""
    index, offset, inside, live, _ = _place(n_groups, groups, length, SIZE, BLOCK, RAGGED)
    x = tl.load(rows + offset, mask=inside, other=0.0)
    top = tl.max(tl.abs(x), 1)
    best = tl.zeros_like(top)
    least = tl.sum(x * x, 1)
    for candidate in range(CANDIDATES):
        fraction = tl.load(fractions + candidate) / -LOW
        for sign in tl.static_range(2):
            s = top * (fraction * (1 - 2 * sign))
            for again in tl.static_range(2):  # noqa: B007  (Triton's `_` would change its type); then refitted to the codes
                stored = _half(s)
                code = _nearest(x, stored, LOW, HIGH)
                delta = x - code * stored[:, None]
                error = tl.sum(delta * delta, 1)
                better = error < least
                least = tl.where(better, error, least)
                best = tl.where(better, stored, best)
                s = tl.math.div_rn(tl.sum(x * code, 1), tl.maximum(tl.sum(code * code, 1), 1.0))
    code = _nearest(x, best, LOW, HIGH) - LOW
    tl.store(codes + offset, code.to(tl.uint8), mask=inside)
    tl.store(scales + index, best.to(tl.float16), mask=live)


@triton.jit
def _nearest(x, scale, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    inverse = tl.where(scale == 0, 0.0, tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    return _round(tl.minimum(tl.maximum(x * inverse[:, None], LOW * 1.0), HIGH * 1.0))


@triton.jit
def pack(  # type: ignore[no-untyped-def]
    codes,  # uint8 [R, n]
    stream,  # uint8 [R, 4·words], written
    n_octets,  # of all rows
    row_octets,
    length,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Eight codes of `BITS` (at most 4) bits are `BITS` bytes, lowest bits first (`milo.format.codes`)."""
    octet = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = octet // row_octets
    lane = tl.arange(0, 8)
    column = (octet - row * row_octets)[:, None] * 8 + lane[None, :]
    live = octet < n_octets
    code = tl.load(codes + row[:, None] * length + column, mask=live[:, None] & (column < length), other=0)
    # The fields do not overlap: their sum, which may wrap into the sign bit, is their union.
    bits = tl.sum(code.to(tl.int32) << (lane * BITS)[None, :], 1)
    for byte in tl.static_range(BITS):
        tl.store(stream + octet * BITS + byte, ((bits >> (8 * byte)) & 0xFF).to(tl.uint8), mask=live)
