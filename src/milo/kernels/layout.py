"""The kernels' layout of compressed matrices, made from the neutral one on whatever device the tensors are on.

`cuda/tile.cuh` states the layout. In short: 64x64 tiles whose codes stand in the order in which the lanes of a warp
consume them, 16 bytes a lane and load; a scale and a zero for each row and group beside one another; V as extra row
tiles in the same layout; U in steps of 16 ranks. Codes keep their density (3.0 bits), every value is kept exactly.
Wide codes and narrow metadata are spread first (`milo.kernels.planes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn import functional as F

from milo.format.codes import unpack_words
from milo.format.matrix import FACTOR_GROUP, Encoding
from milo.kernels.planes import spread

TILE = 64  # rows and in-features of a tile
RANKS = 16  # ranks of one step of U
FACTOR_ZERO = 4  # the code of 0 in an INT3 factor

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PackedMatrix:
    """A stack of `E` compressed matrices in the kernels' layout; `parts` of them interleaved over out-features.

    Attributes:
        codes: int32 `[E, row tiles, K tiles, bits, 32, 4]`.
        meta: float16 `[E, row tiles, groups, 8 or 16, 8, 2]`, (scale, zero).
        u_codes: int32 `[U steps, 3, 32]`.
        u_scales: float16 `[U steps, parts, 16]`.
        v_codes: int32 `[V row tiles, K tiles, bits, 32, 4]`.
        v_meta: float16, as `meta`.
        table: int32 `[E, 4]`: first V row tile, V row tiles, first U step, U steps a row tile; for stacked matrices
            `[matrices, 4]`.
        out_features: `N` of one part.
        in_features: `K`.
        bits: width of a plane's code, 3 or 4.
        group_size: 32, 64 or 128.
        parts: 1, or 2 for gate and up.
        v_row_tiles: the most V row tiles of any expert; 0 where no expert has a compensator.
        planes: 2 for codes of 6 and 8 bits, which stand side by side along K.
        stack: where several matrices are one (`milo.kernels.stacking`), out-features and V row tiles of each.
    """

    codes: torch.Tensor
    meta: torch.Tensor
    u_codes: torch.Tensor
    u_scales: torch.Tensor
    v_codes: torch.Tensor
    v_meta: torch.Tensor
    table: torch.Tensor
    out_features: int
    in_features: int
    bits: int
    group_size: int
    parts: int
    v_row_tiles: int
    planes: int = 1
    stack: tuple[tuple[int, int], ...] = ()

    @property
    def columns(self) -> int:
        """Columns of the kernels' product: `K`, or twice that for two planes."""
        return self.planes * self.in_features

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.meta, self.u_codes, self.u_scales, self.v_codes, self.v_meta, self.table]

    @property
    def numbers(self) -> list[int]:
        sizes = [self.out_features, self.in_features, self.bits, self.group_size]
        return [*sizes, self.parts, self.v_row_tiles, self.planes, *chain(*self.stack)]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> PackedMatrix:
        """Inverse of (`tensors`, `numbers`), which is how a matrix passes through an operator's signature."""
        codes, meta, u_codes, u_scales, v_codes, v_meta, table = tensors
        n, k, bits, group_size, parts, v_row_tiles, planes, *stacked = numbers
        pairs = tuple(zip(stacked[::2], stacked[1::2], strict=True))
        return cls(
            codes, meta, u_codes, u_scales, v_codes, v_meta, table,
            n, k, bits, group_size, parts, v_row_tiles, planes, pairs,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def halves(self) -> int:
        """Groups in the 64 in-features of a tile, at least 1."""
        return 2 if self.group_size == 32 else 1

    def to(self, device: torch.device | str) -> PackedMatrix:
        return PackedMatrix.of([t.to(device) for t in self.tensors], self.numbers)


def supports(encoding: Encoding, shape: tuple[int, int]) -> tuple[bool, str]:
    """Whether a matrix `(N, K)` written so fits the layout, and if not, why."""
    whole = max(TILE, encoding.group_size)
    for fits, reason in (
        (encoding.plane_bits in (3, 4), f"codes of {encoding.bits} bits (3, 4, 6 and 8 are)"),
        (encoding.planes == 1 or shape[1] % whole == 0, f"codes of {encoding.bits} bits in rows of {shape[1]}"),
        (encoding.factor == "int3", f"{encoding.factor} compensators (int3 are)"),
        (shape[0] % 32 == 0 and shape[1] % 32 == 0, f"the shape {shape}, not in multiples of 32,"),
    ):
        if not fits:
            return False, f"{reason} not supported yet"
    return True, "supported"


def repack(parts: Sequence[Sequence[Tensors]], encoding: Encoding, shape: tuple[int, int]) -> PackedMatrix:
    """From the neutral layout to the kernels'.

    Args:
        parts: one part, or two (gate, up) that alternate in runs of 32 out-features; each holds the tensors of every
            expert's matrix by their names in the format. A plain matrix is one part with one member.
        encoding: how all of them are written.
        shape: `(N, K)` of each.

    Raises:
        ValueError: if `supports` says no.
    """
    fits, reason = supports(encoding, shape)
    if not fits:
        raise ValueError(reason)
    n, k = shape
    run = TILE // len(parts)
    members = list(zip(*parts, strict=True))
    table = _table(members, len(parts), -(-n // run))
    packed = _allocate(table, encoding, shape, len(parts), members[0][0]["weight_packed"].device)
    for expert, matrices in enumerate(members):  # one at a time: beside the result there is one expert's work
        plain = [spread(m, encoding, k, TILE) for m in matrices]
        codes, scale, zero = (_interleave(list(each), run) for each in zip(*plain, strict=True))
        packed.codes[expert] = _tile_codes(codes, packed.bits)
        packed.meta[expert] = _tile_meta(scale, zero, encoding.group_size, packed.columns)
        if table[expert][3]:
            _pack_compensator(packed, table[expert], matrices)
    return packed


def _table(members: Sequence[Sequence[Tensors]], parts: int, row_tiles: int) -> list[list[int]]:
    """`PackedMatrix.table`: where each expert's compensator stands."""
    table, tiles_before, steps_before = [], 0, 0
    for matrices in members:
        steps = -(-max(_rank(m) for m in matrices) // RANKS)
        tiles = -(-steps * RANKS * parts // TILE)
        table.append([tiles_before, tiles, steps_before, steps])
        tiles_before, steps_before = tiles_before + tiles, steps_before + steps * row_tiles
    return table


def _allocate(
    table: list[list[int]], encoding: Encoding, shape: tuple[int, int], parts: int, device: torch.device
) -> PackedMatrix:
    n, columns = shape[0], shape[1] * encoding.planes
    experts, row_tiles, k_tiles = len(table), -(-n // (TILE // parts)), -(-columns // TILE)
    records = -(-columns // max(encoding.group_size, TILE))
    halves = 2 if encoding.group_size == 32 else 1
    v_tiles = table[-1][0] + table[-1][1]
    u_steps = table[-1][2] + table[-1][3] * row_tiles

    def words(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=device)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.float16, device=device)

    return PackedMatrix(
        codes=words(experts, row_tiles, k_tiles, encoding.plane_bits, 32, 4),
        meta=numbers(experts, row_tiles, records, 8 * halves, 8, 2),
        u_codes=words(u_steps, 3, 32),
        u_scales=numbers(u_steps, parts, RANKS),
        v_codes=words(v_tiles, k_tiles, encoding.plane_bits, 32, 4),
        v_meta=numbers(v_tiles, k_tiles, 8 * halves, 8, 2),
        table=torch.tensor(table, dtype=torch.int32).to(device),
        out_features=n,
        in_features=shape[1],
        bits=encoding.plane_bits,
        group_size=encoding.group_size,
        parts=parts,
        v_row_tiles=max(row[1] for row in table),
        planes=encoding.planes,
    )


def _pack_compensator(packed: PackedMatrix, row: list[int], matrices: Sequence[Tensors]) -> None:
    """Put the factors of one expert's matrices in their place."""
    v_first, v_tiles, u_first, steps = row
    n, k, ranks, run = packed.out_features, packed.in_features, steps * RANKS, TILE // packed.parts
    row_tiles = packed.codes.shape[1]
    here = slice(u_first, u_first + row_tiles * steps)
    packed.u_codes[here] = _steps(_interleave([_factor(m, "lowrank_u", ranks, n)[:, :n].mT for m in matrices], run))
    packed.u_scales[here] = _step_scales([_factor_scale(m, "lowrank_u", ranks, n) for m in matrices], row_tiles, run)
    here = slice(v_first, v_first + v_tiles)
    rows = torch.cat([_factor(m, "lowrank_v", ranks, k) for m in matrices])
    rows = F.pad(rows, (0, (packed.planes - 1) * k), value=FACTOR_ZERO)  # V multiplies x once, whatever the planes
    packed.v_codes[here] = _tile_codes(_pad(rows, v_tiles * TILE), packed.bits)
    scale = torch.cat([_factor_scale(m, "lowrank_v", ranks, k) for m in matrices])
    scale = F.pad(scale, (0, (packed.planes - 1) * scale.shape[1])).repeat_interleave(packed.halves, -1)
    zero = torch.full_like(scale, FACTOR_ZERO)
    packed.v_meta[here] = _tile_meta(scale, zero, min(packed.group_size, FACTOR_GROUP), packed.columns)


def _rank(tensors: Tensors) -> int:
    return tensors["lowrank_u"].shape[0] if "lowrank_u" in tensors else 0


def _factor(tensors: Tensors, name: str, ranks: int, length: int) -> torch.Tensor:
    """Codes of a factor, uint8 `[ranks, length]`, ranks it lacks filled with the code of 0."""
    if _rank(tensors) == 0:
        template = tensors["weight_packed"]
        return torch.full((ranks, length + -length % TILE), FACTOR_ZERO, dtype=torch.uint8, device=template.device)
    codes = unpack_words(tensors[name], 3, length)
    return F.pad(codes, (0, -length % TILE, 0, ranks - codes.shape[0]), value=FACTOR_ZERO)


def _factor_scale(tensors: Tensors, name: str, ranks: int, length: int) -> torch.Tensor:
    """Scales of a factor, float16 `[ranks, groups]`, zero for ranks it lacks."""
    if _rank(tensors) == 0:
        return tensors["weight_scale"].new_zeros(ranks, -(-length // FACTOR_GROUP))
    return _pad(tensors[name + "_scale"], ranks)


def _pad(rows: torch.Tensor, count: int) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _interleave(parts: list[torch.Tensor], run: int) -> torch.Tensor:
    """`[N, ...]` each, to rows in runs of `run` by turns, padded to whole tiles."""
    padded = [F.pad(p, (0, 0, 0, -p.shape[0] % run)).unflatten(0, (-1, run)) for p in parts]
    return torch.stack(padded, 1).flatten(0, 2)


def _tile_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 `[N, K]` (multiples of 64) to int32 `[N/64, K/64, bits, 32, 4]`, a row tile at a time to bound memory."""
    out = []
    for rows in codes.split(TILE * 32):
        tiled = rows.reshape(-1, 4, 2, 8, codes.shape[1] // TILE, 2, 4, 2, 2, 2)  # tile mt rh g | kt half q sub c e
        tiled = tiled.permute(0, 4, 3, 6, 1, 5, 7, 8, 2, 9)  # tile kt | g q (lane) | mt | half sub c rh (pair) | e
        words = _words(tiled.reshape(*tiled.shape[:2], 32, 4, 16, 2), bits)
        out.append(words.permute(0, 1, 4, 2, 3))
    return torch.cat(out).contiguous()


def _steps(rows: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, ranks]` (multiples of 64 and 16) to int32 `[N/64 * ranks/16, 3, 32]`."""
    tiled = rows.reshape(-1, 4, 2, 8, rows.shape[1] // RANKS, 2, 4, 2)  # tile mt rh g | step c q e
    tiled = tiled.permute(0, 4, 3, 6, 1, 5, 2, 7)  # tile step | g q (lane) | mt c rh (pair) | e
    words = _words(tiled.reshape(-1, 32, 16, 2), 3)
    return words.permute(0, 2, 1).contiguous()


def _words(pairs: torch.Tensor, bits: int) -> torch.Tensor:
    """16 pairs of codes `[..., 16, 2]` to words, int32 `[..., bits]`; `cuda/codes.cuh` decodes them."""
    both = pairs[..., 0].int() | (pairs[..., 1].int() << 16)
    a_word = 5 if bits == 3 else 4
    words = []
    for j in range(bits):
        word = both[..., a_word * j].clone()
        for p in range(1, a_word):
            word |= both[..., a_word * j + p] << (bits * p)
        if bits == 3:
            word |= ((both[..., 15] >> j) & 0x00010001) << 15
        words.append(word)
    return torch.stack(words, -1)


def _step_scales(parts: list[torch.Tensor], row_tiles: int, run: int) -> torch.Tensor:
    """`[ranks, groups]` a part to `[row tile * step, parts, 16]`: the scale of a row tile's group."""
    group = torch.arange(row_tiles, device=parts[0].device) * run // FACTOR_GROUP
    spread = torch.stack([p[:, group].mT.unflatten(-1, (-1, RANKS)) for p in parts], 2)
    return spread.flatten(0, 1).contiguous()


def _tile_meta(scale: torch.Tensor, zero: torch.Tensor, group_size: int, k: int) -> torch.Tensor:
    """fp16 `[N, groups]` each to `[N/64, records, 8 * halves, 8, 2]`."""
    halves = 2 if group_size == 32 else 1
    records = -(-k // max(group_size, TILE))
    both = torch.stack([scale, zero], -1)
    both = F.pad(both, (0, 0, 0, records * halves - both.shape[1], 0, -both.shape[0] % TILE))
    tiled = both.reshape(-1, 4, 2, 8, records, halves, 2)  # tile mt rh g | record half | scale, zero
    tiled = tiled.permute(0, 4, 5, 3, 1, 2, 6)
    return tiled.reshape(tiled.shape[0], records, halves * 8, 8, 2).contiguous()
