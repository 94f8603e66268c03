"""The small matrices of the low-rank fit: a Gram matrix and its Cholesky factor's inverse in one launch.

The libraries' batched Cholesky factorisation and triangular solve are some 15 launches (copies, arrays of pointers)
and serial inside, so that the small matrices of a round take as long as its passes over the weights. Here a program
holds one matrix in registers and takes a step a column. By its instructions, a step of 128 columns is about 900 cycles.

The elimination is done in place. Before step j the tile holds `L⁻¹` in its columns left of j, and in the columns from j
on what is left of the Gram matrix, of which only the upper triangle is read: a row of it is a column of `L`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TINY = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=["width"])
def whiten(  # type: ignore[no-untyped-def]
    gram,  # float32 [E, r, r]
    inverse,  # float32 [E, r, r], written
    width,  # r, at most SIZE
    shift,  # added to the diagonal
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,  # of the columns scaled to length 1
):
    """`L⁻¹·D` of each matrix: `L·Lᵀ = D·G·D + shift`, `D` the inverse lengths of the columns (`UNIT`) or 1."""
    member = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SIZE)
    row, column = index[:, None], index[None, :]
    inside = (row < width) & (column < width)
    place = member * width * width + row * width + column
    tile = tl.load(gram + place, mask=inside, other=0.0)
    lengths = tl.full([SIZE], 1.0, tl.float32)
    if UNIT:
        square = tl.sum(tl.where(row == column, tile, 0.0), 0)
        lengths = tl.where(square > 0, tl.rsqrt(tl.maximum(square, _TINY)), 0.0)
        tile = tile * lengths[:, None] * lengths[None, :]
    tile = tl.where(row == column, tile + shift, tile)
    step = 0
    while step < width:
        line = tl.sum(tl.where(row == step, tile, 0.0), 0)
        pivot = tl.sum(tl.where(index == step, line, 0.0), 0)
        root = tl.rsqrt(tl.maximum(pivot, _TINY))
        line = tl.where(index == step, root, line * root)
        below = tl.where(index > step, line, 0.0)
        kept = tl.where((column == step) & (row > step), 0.0, tile)
        tile = tl.where(row == step, line[None, :], kept - below[:, None] * line[None, :])
        step += 1
    tile = tl.where(row >= column, tile, 0.0) * lengths[None, :]
    tl.store(inverse + place, tile, mask=inside)
