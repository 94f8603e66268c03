"""The output of a plan: which tensors go into which shard, and which bytes of them belong to which work item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from milo.checkpoint.compressed import DIGEST_KEY
from milo.checkpoint.inventory import Inventory, Kind
from milo.checkpoint.layout import Shard, Unit, lay_out
from milo.checkpoint.source import Checkpoint
from milo.format.matrix import TensorSpec
from milo.plan.plan import Plan, Row

MAX_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Place:
    """Where one tensor of one solved matrix is written.

    Attributes:
        member: whose tensor it is.
        suffix: which of its tensors (`weight_packed`, ...).
        name: the tensor in the file, which for a stack holds all members'.
        first_row: where in it this member's part begins.
        spec: dtype and shape of the part (with the leading dimension of a stack's tensors).
    """

    member: int
    suffix: str
    name: str
    first_row: int
    spec: TensorSpec


def lay_out_checkpoint(
    source: Checkpoint, inventory: Inventory, plan: Plan, max_shard_size: int = MAX_SHARD_SIZE
) -> list[Shard]:
    """The output's shards: copied tensors first, then the matrices in the plan's order."""
    units: list[Unit] = [[(name, copied_spec(source, name))] for name in inventory.kept(plan.by_name)]
    for row in plan.rows:
        tensors = row.tensors()
        if row.kind is Kind.EXPERTS:
            by_matrix: dict[str, list[tuple[str, TensorSpec]]] = {name: [] for name in row.matrices()}
            for name, spec in tensors.items():
                by_matrix[name.rpartition(".")[0]].append((name, spec))
            units.extend(by_matrix.values())
        else:
            units.append(list(tensors.items()))
    return lay_out(units, max_shard_size, {DIGEST_KEY: plan.digest})


def copied_spec(source: Checkpoint, name: str) -> TensorSpec:
    """dtype and shape of a tensor that is not compressed; FP8 is written out as bfloat16."""
    info = source.tensors[name]
    return TensorSpec("BF16" if info.dtype == "F8_E4M3" else info.dtype, info.shape)


def places(row: Row, members: range) -> Iterator[Place]:
    """Everything that solving some members of a row writes, in a fixed order."""
    stack = row.kind is Kind.STACK
    names = row.matrices()
    for member in members:
        prefix = row.name if stack else names[member]
        for suffix, spec in row.encoding.tensors(row.shape, row.ranks[member]).items():
            if not stack:
                yield Place(member, suffix, f"{prefix}.{suffix}", 0, spec)
            elif suffix.startswith("lowrank"):
                yield Place(member, suffix, f"{prefix}.{suffix}", sum(row.ranks[:member]), spec)
            else:
                yield Place(member, suffix, f"{prefix}.{suffix}", member, TensorSpec(spec.dtype, (1, *spec.shape)))
