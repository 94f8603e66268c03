"""Matrices with the same in-features as one over their out-features, so that one launch multiplies by all of them.

Each keeps its own rank: a row tile goes by the entry of the table that its matrix has, and all of V is computed first
(`cuda/units.cuh`). Made into one matrix beforehand they would have a U that is mostly zeros, 16 to 29 % more bytes for
the q, k and v of our models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from milo.kernels.layout import TILE, PackedMatrix

MAX_STACK = 4  # matrices that one launch can take


def stack(matrices: Sequence[PackedMatrix]) -> PackedMatrix:
    """Several matrices with the same in-features as one over their out-features: one launch for all of them.

    Args:
        matrices: single ones (`E = 1`, one part) with the same in-features, bits, groups and planes; the out-features
            of all but the last are multiples of 64. Their ranks are their own.

    Raises:
        ValueError: they do not stack, and why.
    """
    first = matrices[0]
    if any(m.parts != 1 or m.codes.shape[0] != 1 or m.stack for m in matrices) or len(matrices) > MAX_STACK:
        raise ValueError(f"at most {MAX_STACK} single matrices stack")
    if len({(m.in_features, m.bits, m.group_size, m.planes) for m in matrices}) > 1:
        raise ValueError("matrices that differ in in-features, bits, groups or planes do not stack")
    if any(m.out_features % TILE for m in matrices[:-1]):
        raise ValueError(f"only the last of stacked matrices may have out-features that are no multiple of {TILE}")
    table = torch.cat([m.table for m in matrices])
    table[1:, 0] = table[:-1, 1].cumsum(0)
    table[1:, 2] = torch.tensor([len(m.u_codes) for m in matrices[:-1]], device=table.device).cumsum(0)
    tensors = [
        torch.cat(parts, 1 if number < 2 else 0)  # codes and metadata lead with the expert
        for number, parts in enumerate(zip(*(m.tensors[:-1] for m in matrices), strict=True))
    ]
    stacked = [(m.out_features, m.v_row_tiles) for m in matrices]
    rows, v_row_tiles = (sum(sizes) for sizes in zip(*stacked, strict=True))
    numbers = [rows, *first.numbers[1:5], v_row_tiles, first.planes, *chain(*stacked)]
    return PackedMatrix.of([*tensors, table], numbers)


def apart(weight: PackedMatrix) -> list[PackedMatrix]:
    """The matrices that a stack was made of, as views of it; of anything else that itself."""
    found, row = [], 0
    for number, (out_features, v_row_tiles) in enumerate(weight.stack):
        rows = slice(row, row + -(-out_features // TILE))
        tensors = [
            weight.codes[:, rows],
            weight.meta[:, rows],
            *weight.tensors[2:-1],
            weight.table[number : number + 1],
        ]
        numbers = [out_features, *weight.numbers[1:5], v_row_tiles, weight.planes]
        found.append(PackedMatrix.of(tensors, numbers))
        row = rows.stop
    return found or [weight]
