"""The order in which items are solved, which decides how soon trouble shows and how evenly the work ends.

Largest first, as list scheduling wants it: the last items to finish are small, so no worker is left alone with a big
one. Copies come before everything else, because reading and writing overlaps with solving and not with itself.

The very first is the *canary*: the item that needs the most memory, solved alone if the run is a long one. A GPU
that is too small, a disk that lies about its room or a solver that fails show within the first minute.
"""

from __future__ import annotations

from collections.abc import Sequence

from milo.pipeline.work import Item
from milo.plan.plan import Plan

LONG = 16  # items a worker; in a shorter run the canary sings in the choir


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
    """Copies, then the largest first; equal ones in the order of the output."""
    copies = [item for item in items if not item.row]
    return copies + sorted((item for item in items if item.row), key=lambda item: -cost(item, plan))


def take_canary(items: Sequence[Item], plan: Plan, workers: int) -> tuple[list[Item], list[Item]]:
    """Split off the item to begin with: the one with the most elements, then the highest rank.

    Returns:
        The canary (empty for a short run) and the rest, in order.
    """
    solved = [item for item in items if item.row]
    if len(solved) <= LONG * workers:
        return [], list(items)

    def need(item: Item) -> tuple[int, int]:
        row = plan.by_name[item.row]
        return len(item.members) * row.shape[0] * row.shape[1], max(row.ranks[item.first : item.stop])

    canary = max(solved, key=need)
    return [canary], [item for item in items if item != canary]
