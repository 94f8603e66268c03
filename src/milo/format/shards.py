"""A shard of a stored matrix: some of its out-features and some of its in-features, exactly, no weight decoded.

Tensor parallelism cuts a matrix where it likes, in multiples of 32 features; the format's groups do not follow: a
group of 64 in-features shares a scale and a zero, and so do 64 elements of a row of a factor. A shard therefore
*begins at the boundary before its own first feature*. Of a matrix of 448 in-features the second half, 224 to 447,
is stored as features 192 to 447: the group that the cut goes through is in both halves, codes, scale and all, and
every group of the shard is a whole group of the matrix. What stands before the first feature is its *lead*, 0 or 32
features. Leading in-features are to be multiplied by zero. Leading out-features are made to be zero (their scales and
their part of U are), so that experts need no care: a leading row of `gate` and `up` is the zero that meets a leading
column of `down`.

Where the boundary lies inside a group of 128, groups are halved and their scales and zeros repeated.

Everything works on one stored tensor at a time, because loaders hand them over one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from milo.format.codes import BLOCK, pack_bytes, pack_words, unpack_bytes
from milo.format.matrix import FACTOR_BITS, FACTOR_GROUP, Encoding

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Span:
    """Features `begin .. end` of a matrix that has `total` of them along that side.

    Raises:
        ValueError: a cut that is not at a multiple of 32.
    """

    begin: int
    end: int
    total: int

    def __post_init__(self) -> None:
        cuts_a_block = self.begin % BLOCK or (self.end % BLOCK and self.end != self.total)
        if cuts_a_block or not 0 <= self.begin < self.end <= self.total:
            raise ValueError(f"features {self.begin} to {self.end} of {self.total} are not whole blocks of {BLOCK}")

    @classmethod
    def all(cls, total: int) -> Span:
        return cls(0, total, total)

    @property
    def lead(self) -> int:
        """Features before the first that are stored with it."""
        return self.begin % FACTOR_GROUP

    @property
    def start(self) -> int:
        """The first stored feature."""
        return self.begin - self.lead

    @property
    def stored(self) -> int:
        """Features that are stored."""
        return self.end - self.start

    @property
    def whole(self) -> bool:
        return self.stored == self.total


def shard_encoding(encoding: Encoding, columns: Span) -> Encoding:
    """How a shard of these in-features is written: as the matrix, but for groups that its first boundary halves."""
    size = encoding.group_size
    while columns.start % size:
        size //= 2
    return encoding if size == encoding.group_size else replace(encoding, group_size=size)


def cut_shard(tensors: Tensors, encoding: Encoding, rows: Span, columns: Span) -> dict[str, torch.Tensor]:
    """A shard of one matrix: `rows.stored` by `columns.stored` features, written in `shard_encoding`.

    Args:
        tensors: of the matrix, by suffix.
        encoding: how they are written.
        rows: out-features.
        columns: in-features.
    """
    return {name: cut_tensor(name, tensor, encoding, rows, columns) for name, tensor in tensors.items()}


def cut_tensor(name: str, tensor: torch.Tensor, encoding: Encoding, rows: Span, columns: Span) -> torch.Tensor:
    """One tensor of `cut_shard`: a view where nothing has to change.

    Args:
        name: its suffix.
        tensor: as stored.
        encoding: how it is written.
        rows: out-features.
        columns: in-features.
    """
    if name.startswith("lowrank_u"):
        cut = _cut_factor(name, tensor, encoding, rows)
        return _zero_lead(cut, encoding, rows.lead) if name == "lowrank_u" and rows.lead else cut
    if name.startswith("lowrank_v"):
        return _cut_factor(name, tensor, encoding, columns)
    cut = tensor if rows.whole else tensor[rows.start : rows.end]
    if name.startswith("weight_packed"):
        bits = encoding.plane_bits
        cut = cut[:, columns.start // BLOCK * bits : -(-columns.end // BLOCK) * bits]
    elif name in ("weight_scale", "weight_zero") and not columns.whole:
        bits = encoding.scale_bits if name == "weight_scale" else encoding.zero_bits
        cut = _cut_groups(cut, bits, encoding, columns)
    if name == "weight_scale" and rows.lead:
        cut = cut.clone()
        cut[: rows.lead] = 0
    return cut


def pad_columns(tensors: Tensors, encoding: Encoding, columns: int, wanted: int) -> dict[str, torch.Tensor]:
    """The same matrix with more in-features, whatever their weights are: they are to be multiplied by zero.

    Args:
        tensors: of the matrix, by suffix.
        encoding: how they are written.
        columns: its in-features.
        wanted: in-features of the result, a multiple of 32.
    """
    rank = tensors["lowrank_v"].shape[0] if "lowrank_v" in tensors else 0
    specs = encoding.tensors((tensors["weight_packed"].shape[0], wanted), rank)
    before, after = encoding.groups(columns), encoding.groups(wanted)
    padded = {}
    for name, tensor in tensors.items():
        if name in ("weight_scale", "weight_zero") and tensor.dtype == torch.uint8:
            bits = encoding.scale_bits if name == "weight_scale" else encoding.zero_bits
            padded[name] = pack_bytes(F.pad(unpack_bytes(tensor, bits, before), (0, after - before)), bits)
        elif name.startswith("lowrank_u") or name == "weight_super_scale":
            padded[name] = tensor
        else:
            padded[name] = F.pad(tensor, (0, specs[name].shape[-1] - tensor.shape[-1]))
    return padded


def _cut_groups(meta: torch.Tensor, bits: int, encoding: Encoding, columns: Span) -> torch.Tensor:
    """Scales or zeros of the shard's groups; each is that of the group in which the shard's begins."""
    size = shard_encoding(encoding, columns).group_size
    groups = torch.arange(columns.start, columns.end, size, device=meta.device) // encoding.group_size
    if bits == 16:
        return meta[:, groups]
    return pack_bytes(unpack_bytes(meta, bits, encoding.groups(columns.total))[:, groups], bits)


def _cut_factor(name: str, tensor: torch.Tensor, encoding: Encoding, span: Span) -> torch.Tensor:
    """A factor or its scales `[r, …]` along the features of `span`."""
    bits = FACTOR_BITS[encoding.factor]
    if name.endswith("_scale"):
        return tensor[:, span.start // FACTOR_GROUP : -(-span.end // FACTOR_GROUP)]
    if bits == 16:
        return tensor[:, span.start : span.end]
    return tensor[:, span.start // BLOCK * bits : -(-span.end // BLOCK) * bits]


def _zero_lead(factor: torch.Tensor, encoding: Encoding, lead: int) -> torch.Tensor:
    """`factor` with zeros in the first `lead` elements of every row."""
    bits = FACTOR_BITS[encoding.factor]
    factor = factor.clone()
    if bits == 16:
        factor[:, :lead] = 0
    else:
        zero = pack_words(torch.full((lead,), 2 ** (bits - 1)), bits)
        factor[:, : len(zero)] = zero.to(factor.device)
    return factor
