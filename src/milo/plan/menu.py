"""The menu: what a group of matrices may become, and which groups must choose alike.

Experts of one projection always share bits and group size, because they are one launch of a kernel; gate and up
share them too, since kernels fuse the two. Ranks are each matrix's own. Metadata is compact (6-bit scales; zeros of
6 bits up to 4-bit codes and of 8 above, where a coarser zero would cost more than it saves, see docs/budget.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from milo.checkpoint.inventory import Group, Kind
from milo.format.matrix import Encoding

MENU = (
    Encoding(3, 128, 6, 6),
    Encoding(3, 64, 6, 6),
    Encoding(3, 32, 6, 6),
    Encoding(4, 64, 6, 6),
    Encoding(4, 32, 6, 6),
    Encoding(6, 64, 6, 8),
    Encoding(8, 64, 6, 8),
)
# An untied head takes these bits at least, or stays as it is.
HEAD_BITS = 6
# Ranks that are tried where a matrix looks low-rank enough, see `milo.pipeline.measure_menu`.
RANKS = (8, 32)

_FUSED = re.compile(r"\.(gate_proj|up_proj|w1|w3)$")


@dataclass(frozen=True)
class Measured:
    """Squared errors of a group's options, as they would be stored.

    Attributes:
        norm: `Σ‖W‖²` over the members.
        errors: for every encoding, for every member, `‖W − Ŵ‖²` (in-features weighted by their importance) by rank (0
            always among them).
    """

    norm: float
    errors: Mapping[Encoding, Sequence[Mapping[int, float]]]

    def relative(self, encoding: Encoding, ranks: Sequence[int]) -> float:
        """Squared error of the group relative to its norm."""
        if self.norm == 0:
            return 0.0
        return sum(by_rank[r] for by_rank, r in zip(self.errors[encoding], ranks, strict=True)) / self.norm


@dataclass(frozen=True)
class Option:
    """One way to write a group.

    Attributes:
        encoding: bits, group size, metadata.
        ranks: rank of each member.
        nbytes: exact bytes on disk.
        loss: sensitivity times relative squared error.
    """

    encoding: Encoding
    ranks: tuple[int, ...]
    nbytes: int
    loss: float


def units(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that must share bits and group size, in checkpoint order."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(_FUSED.sub(".gate+up", group.name), []).append(group)
    return list(found.values())


def option(
    group: Group, measured: Measured, sensitivity: float, encoding: Encoding, price: float | None = None
) -> Option:
    """The group in this encoding, every member with the rank that pays at the price of a byte.

    Args:
        group: the matrices.
        measured: their errors.
        sensitivity: loss at a relative squared error of 1.
        encoding: one that was measured.
        price: loss that a byte must save; None for no rank.
    """
    ranks = [0] * group.count
    if price is not None and measured.norm:
        scale = sensitivity / measured.norm
        for member, by_rank in enumerate(measured.errors[encoding]):
            cost = {
                rank: scale * error + price * factor_bytes(group, encoding, rank) for rank, error in by_rank.items()
            }
            ranks[member] = min(cost, key=cost.__getitem__)
    return Option(
        encoding, tuple(ranks), _nbytes(group, encoding, ranks), sensitivity * measured.relative(encoding, ranks)
    )


def factor_bytes(group: Group, encoding: Encoding, rank: int) -> int:
    """Bytes of one member's compensator."""
    return sum(spec.nbytes for spec in encoding.factor_tensors(*group.shape, rank).values())


def _nbytes(group: Group, encoding: Encoding, ranks: Sequence[int]) -> int:
    factors = sum(factor_bytes(group, encoding, rank) for rank in ranks)
    if group.kind is Kind.STACK:
        return encoding.nbytes((group.count, *group.shape), 0) + factors
    return group.count * encoding.nbytes(group.shape, 0) + factors
