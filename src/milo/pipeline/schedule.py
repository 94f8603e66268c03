"""The order in which items are solved, which decides how soon trouble shows and how evenly the work ends.

Largest first, as list scheduling wants it: the last items to finish are small, so no worker is left alone with a big
one. Copies come before everything else, because reading and writing overlaps with solving and not with itself.

The very first is the *canary*: the item that needs the most memory. A GPU that is too small, a disk that lies about
its room or a solver that fails show within the first minute. The others follow without waiting for it: what it meets
ends the run all the same, and with two GPUs one would stand idle meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from milo.pipeline.work import Item
from milo.plan.plan import Plan


def passes(rank: int, rounds: int) -> float:
    """Work of solving a matrix, in passes over its weights; good enough to sort by.

    A solve of the grid takes some 20 passes; a low-rank fit of rank r is three products of 2r operations a weight,
    each about a sixteenth of a pass.
    """
    return 20 if rank == 0 else rounds * (20 + 0.4 * rank)


def cost(item: Item, plan: Plan) -> float:
    """Work of an item, in passes over one weight."""
    row = plan.by_name[item.row]
    ranks = row.ranks[item.first : item.stop]
    return row.shape[0] * row.shape[1] * sum(passes(rank, plan.rounds) for rank in ranks)


def in_order(items: Sequence[Item], plan: Plan) -> list[Item]:
    """The canary, copies, then the largest first; equal ones in the order of the output."""
    copies = [item for item in items if not item.row]
    solved = sorted((item for item in items if item.row), key=lambda item: -cost(item, plan))

    def need(item: Item) -> tuple[int, int]:
        row = plan.by_name[item.row]
        return len(item.members) * row.shape[0] * row.shape[1], max(row.ranks[item.first : item.stop])

    canary = [max(solved, key=need)] if solved else []
    return canary + copies + [item for item in solved if item not in canary]
