"""From a source to a plan: inventory, recipe, and whatever of the weights the rank policy wants to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from milo.checkpoint.inventory import Inventory, Placement, take_inventory
from milo.checkpoint.source import Checkpoint
from milo.pipeline.work import one_thread, piece_bytes, read_matrix, worker_count
from milo.plan.plan import Plan, make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import Recipe
from milo.plan.statistics import WeightStatistics

# Bytes of float32 matrices that are looked at at a time; the source's are mostly half as large.
_IN_HAND = 1 << 31


@dataclass(frozen=True)
class Source:
    """An opened checkpoint and what is in it."""

    checkpoint: Checkpoint
    inventory: Inventory

    @classmethod
    def of(cls, checkpoint: Checkpoint, placements: Mapping[str, Placement] | None) -> Source:
        """Take the inventory of a checkpoint.

        Args:
            checkpoint: the opened folder.
            placements: what the model's class says of its tensors, None if there is no class.
        """
        heads = [info for info in checkpoint.tensors.values() if not checkpoint.is_block_scale(info.name)]
        return cls(checkpoint, take_inventory(heads, checkpoint.config, placements))

    @property
    def sixteen_bit_bytes(self) -> int:
        """Bytes of the weights that can be compressed, at 16 bits each."""
        return 2 * sum(group.parameters for group in self.inventory.groups)


def plan_source(
    source: Source,
    recipe: Recipe,
    *,
    counts: Mapping[str, Sequence[float]] | None = None,
    on_group: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Make the plan; weights are read only if the rank policy looks at them.

    Args:
        source: an opened source.
        recipe: what the user chose.
        counts: routing counts for the frequency policy.
        on_group: called before a group's weights are read.

    Raises:
        PlanError: the policy is unknown or lacks counts.
        WeightError: NaN or Inf in a weight that was looked at.
    """
    largest = max((4 * prod(group.shape) for group in source.inventory.groups), default=1)
    readers = max(1, min(worker_count("cpu"), _IN_HAND // largest))
    with ThreadPoolExecutor(readers, "look", torch.set_num_threads, (1,)) as pool, one_thread():
        statistics = WeightStatistics(lambda group: partial(read_matrix, source.checkpoint, group), on_group, pool.map)
        evidence = Evidence(statistics.kurtosis, counts)
        return make_plan(source.inventory, recipe, source.checkpoint.config, evidence)


def peak_bytes(plan: Plan, device: str = "cpu", workers: int | None = None) -> int:
    """Peak memory of carrying the plan out with `workers` items at a time, the Python process itself excluded.

    Args:
        plan: what is done.
        device: where; each GPU has one item at a time.
        workers: CPU threads, all cores by default.
    """
    return (workers or worker_count(device)) * max(piece_bytes(row, device) for row in plan.rows)
