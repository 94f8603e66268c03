"""The allocator: one option for every unit, least total loss, total bytes within a budget. Solved exactly.

This is a multiple-choice knapsack. Pricing a byte at `λ` takes the constraint away: every unit then takes the option
of least `loss + λ · bytes` by itself, and the sum of those minima less `λ · budget` bounds the optimum from below for
any `λ` (Lagrangian duality). The best `λ` follows from the units' convex hulls: sort all steps from one hull point to
the next by loss saved per byte and take them until the budget is spent; the step that no longer fits names the price.

What is left between that bound and the greedy solution is small, and closes by dynamic programming: an option whose
reduced cost `loss + λ · bytes − minimum` exceeds the gap cannot be part of a better solution, so only a few options of
each unit survive, and so do few partial sums of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from milo.errors import PlanError

# Partial sums kept at most. Beyond it (never seen) the worst are dropped and the reported gap stays open.
_STATES = 1 << 18
# Bounds closer than this, relative to the loss, count as equal.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        choices: index of the option of every unit.
        nbytes: bytes of the choices, at most the budget.
        loss: loss of the choices.
        price: loss that one more byte would save, at the margin; 0 where the budget buys everything.
        bound: no allocation within the budget has a smaller loss.
    """

    choices: tuple[int, ...]
    nbytes: int
    loss: float
    price: float
    bound: float

    @property
    def gap(self) -> float:
        """Proven relative distance from the optimum."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def allocate(nbytes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> Allocation:
    """Choose one option a unit.

    Args:
        nbytes: bytes of every option, one sequence a unit.
        losses: loss of every option, likewise.
        budget: bytes in all.

    Raises:
        PlanError: the smallest options together exceed the budget.
    """
    sizes = [np.asarray(row, dtype=np.int64) for row in nbytes]
    costs = [np.asarray(row, dtype=np.float64) for row in losses]
    least = sum(int(row.min()) for row in sizes)
    if least > budget:
        raise PlanError(f"the budget of {budget:,} bytes is too small: the smallest choice takes {least:,} bytes")
    choices, price = _greedy(sizes, costs, budget)
    priced = [cost + price * size for size, cost in zip(sizes, costs, strict=True)]
    relaxed = float(sum(row.min() for row in priced)) - price * budget
    best, proven = _improve(sizes, costs, priced, price, budget, choices, relaxed)
    total, loss = _sums(sizes, costs, best)
    return Allocation(tuple(best), total, loss, price, loss if proven else min(relaxed, loss))


def _sums(sizes: list[np.ndarray], costs: list[np.ndarray], choices: list[int]) -> tuple[int, float]:
    total = sum(int(size[c]) for size, c in zip(sizes, choices, strict=True))
    return total, float(sum(cost[c] for cost, c in zip(costs, choices, strict=True)))


def _hull(size: np.ndarray, cost: np.ndarray) -> list[int]:
    """Options on the lower convex hull, from the smallest to the best."""
    hull: list[int] = []
    for i in np.lexsort((cost, size)).tolist():
        if hull and cost[i] >= cost[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(size, cost, hull[-2], hull[-1]) <= _slope(size, cost, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(size: np.ndarray, cost: np.ndarray, a: int, b: int) -> float:
    """Loss saved per byte from option `a` to the larger option `b`."""
    return float((cost[a] - cost[b]) / (size[b] - size[a]))


def _greedy(sizes: list[np.ndarray], costs: list[np.ndarray], budget: int) -> tuple[list[int], float]:
    """The steps of the hulls by loss saved per byte, as far as the budget goes, and the price of a byte there."""
    hulls = [_hull(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    choices = [hull[0] for hull in hulls]
    spent = sum(int(size[c]) for size, c in zip(sizes, choices, strict=True))
    steps = sorted(
        (-_slope(sizes[u], costs[u], a, b), u, position)
        for u, hull in enumerate(hulls)
        for position, (a, b) in enumerate(pairwise(hull))
    )
    price, stopped = 0.0, set()
    for slope, u, position in steps:
        if u in stopped:
            continue
        a, b = hulls[u][position], hulls[u][position + 1]
        step = int(sizes[u][b] - sizes[u][a])
        if spent + step > budget:
            stopped.add(u)  # its further steps build on this one
            price = price or -slope
            continue
        choices[u], spent = b, spent + step
    return choices, price


def _improve(
    sizes: list[np.ndarray],
    costs: list[np.ndarray],
    priced: list[np.ndarray],
    price: float,
    budget: int,
    choices: list[int],
    relaxed: float,
) -> tuple[list[int], bool]:
    """Dynamic programming over what the bound leaves: the best choices, and whether they are proven best."""
    loss = _sums(sizes, costs, choices)[1]
    window = (loss - relaxed) * (1 + 1e-12) - _TOLERANCE * abs(loss)
    if window <= 0:
        return choices, True
    reduced = [row - row.min() for row in priced]
    kept = [np.flatnonzero(row <= window) for row in reduced]
    best_of_rest = [int(sizes[u][k].min()) for u, k in enumerate(kept)]
    remaining = np.cumsum([0, *best_of_rest[::-1]])[::-1]
    # A state: bytes so far and reduced cost so far. Its loss is known at the end: relaxed + reduced + price · unspent.
    state_bytes, state_cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    proven = True
    for u, options in enumerate(kept):
        total = (state_bytes[:, None] + sizes[u][options]).ravel()
        cost = (state_cost[:, None] + reduced[u][options]).ravel()
        index = np.flatnonzero((cost <= window) & (total + remaining[u + 1] <= budget))
        # Of two states the one with fewer bytes and less true loss (reduced cost less the price of its bytes) wins.
        true_cost = cost[index] - price * total[index]
        index = index[np.lexsort((true_cost, total[index]))]
        true_cost = cost[index] - price * total[index]
        front = np.minimum.accumulate(np.concatenate(([np.inf], true_cost[:-1])))
        index = index[true_cost < front]
        if len(index) > _STATES:
            proven = False
            index = np.sort(index[np.argsort(cost[index], kind="stable")[:_STATES]])
        history.append((index // len(options), options[index % len(options)]))
        state_bytes, state_cost = total[index], cost[index]
        if not len(index):
            return choices, proven
    final = state_cost + price * (budget - state_bytes)
    winner = int(np.argmin(final))
    if final[winner] >= window:
        return choices, proven
    found = []
    for parents, options in reversed(history):
        found.append(int(options[winner]))
        winner = int(parents[winner])
    return found[::-1], proven
