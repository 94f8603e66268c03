"""The kernels' layout read back: integer codes and fp16 scales of one expert, and from them the neutral tensors.

The layout keeps every number exactly, so a model whose weights stand in it can still be saved bit for bit, and the
PyTorch reference can check the kernels without a second copy of the weights. `cuda/tile.cuh` states the layout.
"""

from __future__ import annotations

import torch

from milo.format.codes import pack_words
from milo.format.matrix import FACTOR_GROUP, Encoding
from milo.kernels.layout import RANKS, TILE, PackedMatrix
from milo.kernels.planes import gather


def weight_codes(weight: PackedMatrix, expert: int) -> torch.Tensor:
    """Codes of one expert, uint8 `[parts, N padded, K padded]`."""
    return _parts(weight, _tile_codes(weight.codes[expert], weight.bits))


def weight_meta(weight: PackedMatrix, expert: int) -> torch.Tensor:
    """Scale and zero of every group, float16 `[parts, N padded, groups padded, 2]`."""
    return _parts(weight, _tile_meta(weight.meta[expert], weight.halves))


def u_factor(weight: PackedMatrix, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of U, uint8 `[parts, N padded, ranks]`, and its scales, float16 `[parts, row tiles, ranks]`.

    `ranks` is the expert's rank rounded up to whole steps, 0 where it has no compensator. A row tile holds
    `64 / parts` rows of a part.
    """
    _, _, at, steps = weight.table[expert].tolist()
    row_tiles, run = weight.codes.shape[1], TILE // weight.parts
    words = weight.u_codes[at : at + row_tiles * steps].permute(0, 2, 1)
    codes = _pairs(words, 3).reshape(row_tiles, steps, 8, 4, 4, 2, 2, 2)  # tile step g q mt c rh e
    codes = codes.permute(0, 4, 6, 2, 1, 5, 3, 7).reshape(row_tiles, weight.parts, run, steps * RANKS)
    scales = weight.u_scales[at : at + row_tiles * steps].unflatten(0, (row_tiles, steps))
    scales = scales.permute(2, 0, 1, 3).flatten(2)  # part, tile, rank
    return codes.transpose(0, 1).flatten(1, 2), scales


def v_factor(weight: PackedMatrix, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of V, uint8 `[parts, ranks, K padded]`, and its scales, float16 `[parts, ranks, groups of 64]`."""
    first, tiles, _, steps = weight.table[expert].tolist()
    rows = weight.parts * steps * RANKS
    codes = _tile_codes(weight.v_codes[first : first + tiles], weight.bits)[:rows]
    scales = _tile_meta(weight.v_meta[first : first + tiles], weight.halves)[:rows, :: weight.halves, 0]
    return codes.unflatten(0, (weight.parts, -1)), scales.unflatten(0, (weight.parts, -1))


def unpack(weight: PackedMatrix, expert: int, part: int, rank: int, encoding: Encoding) -> dict[str, torch.Tensor]:
    """The neutral tensors of one matrix, bit for bit what `repack` was given.

    Args:
        weight: the stack.
        expert: member of it.
        part: 0, or 1 for the second of two (up beside gate).
        rank: rank of this matrix, which the layout has rounded up.
        encoding: how the matrix was written.
    """
    n, k = weight.out_features, weight.in_features
    meta = weight_meta(weight, expert)[part, :n, : weight.planes * encoding.groups(k)]
    tensors = gather(weight_codes(weight, expert)[part, :n], meta[..., 0], meta[..., 1], encoding, k)
    if rank:
        codes, scales = u_factor(weight, expert)
        # A group of 64 rows lies in `parts` row tiles, each of which repeats its scale.
        tensors["lowrank_u"] = pack_words(codes[part, :n, :rank].mT, 3)
        tensors["lowrank_u_scale"] = scales[part, :: weight.parts, :rank].mT.contiguous()
        codes, scales = v_factor(weight, expert)
        tensors["lowrank_v"] = pack_words(codes[part, :rank, :k], 3)
        tensors["lowrank_v_scale"] = scales[part, :rank, : -(-k // FACTOR_GROUP)].contiguous()
    return tensors


def _parts(weight: PackedMatrix, rows: torch.Tensor) -> torch.Tensor:
    """`[rows in runs by turns, ...]` to `[parts, N padded, ...]`."""
    return rows.unflatten(0, (-1, weight.parts, TILE // weight.parts)).transpose(0, 1).flatten(1, 2)


def _tile_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[row tiles, K tiles, bits, 32, 4]` to uint8 `[rows, K padded]`."""
    row_tiles, k_tiles = codes.shape[:2]
    values = _pairs(codes.permute(0, 1, 3, 4, 2), bits)  # tile kt lane mt pair e
    values = values.reshape(row_tiles, k_tiles, 8, 4, 4, 2, 2, 2, 2, 2)  # tile kt g q mt half sub c rh e
    return values.permute(0, 4, 8, 2, 1, 5, 3, 6, 7, 9).reshape(row_tiles * TILE, k_tiles * TILE)


def _tile_meta(meta: torch.Tensor, halves: int) -> torch.Tensor:
    """`[row tiles, records, 8 * halves, 8, 2]` to float16 `[rows, groups, 2]`."""
    row_tiles, records = meta.shape[:2]
    numbers = meta.reshape(row_tiles, records, halves, 8, 4, 2, 2)  # tile record half g mt rh sz
    return numbers.permute(0, 4, 5, 3, 1, 2, 6).reshape(row_tiles * TILE, records * halves, 2)


def _pairs(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of the layout's words: int32 `[..., bits]` to uint8 `[..., 16, 2]`."""
    a_word, mask = (5, 7) if bits == 3 else (4, 15)
    pairs = []
    for j in range(bits):
        for p in range(a_word):
            pairs.append(torch.stack([(words[..., j] >> (bits * p + 16 * e)) & mask for e in range(2)], -1))
    if bits == 3:
        spread = torch.stack([(words >> (15 + 16 * e)) & 1 for e in range(2)], -1)  # a bit of the code in each word
        pairs.append(spread[..., 0, :] | spread[..., 1, :] << 1 | spread[..., 2, :] << 2)
    return torch.stack(pairs, -2).to(torch.uint8)
