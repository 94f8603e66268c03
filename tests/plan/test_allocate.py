"""The allocator is exact, keeps the budget, and says how sure it is."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milo.errors import PlanError
from milo.plan.allocate import allocate


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    units = draw(st.integers(1, 5))
    options = draw(st.lists(st.integers(1, 5), min_size=units, max_size=units))
    sizes = [draw(st.lists(st.integers(1, 40), min_size=n, max_size=n)) for n in options]
    losses = [draw(st.lists(st.floats(0, 10, allow_subnormal=False), min_size=n, max_size=n)) for n in options]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return sizes, losses, draw(st.integers(least, most + 2))


@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_it_finds_the_best_of_all_choices(problem: tuple[list[list[int]], list[list[float]], int]) -> None:
    sizes, losses, budget = problem
    best = min(
        sum(row[c] for row, c in zip(losses, choice, strict=True))
        for choice in product(*(range(len(row)) for row in sizes))
        if sum(row[c] for row, c in zip(sizes, choice, strict=True)) <= budget
    )
    found = allocate(sizes, losses, budget)
    assert found.nbytes == sum(row[c] for row, c in zip(sizes, found.choices, strict=True)) <= budget
    assert found.loss == pytest.approx(sum(row[c] for row, c in zip(losses, found.choices, strict=True)), abs=1e-12)
    assert found.loss == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert found.bound <= best + 1e-9
    assert found.price >= 0


def realistic(units: int, seed: int = 0) -> tuple[list[list[int]], list[list[float]], int]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 200, units) * 10_000
    rates = np.array([3.2, 3.4, 4.2, 4.4, 6.25, 8.25])
    errors = np.array([0.027, 0.021, 0.0068, 0.0051, 0.0004, 0.00003])
    losses = rng.lognormal(0, 1, (units, 1)) * errors * (1 + 0.05 * rng.random((units, 6)))
    return (weights[:, None] * rates / 8).astype(int).tolist(), losses.tolist(), int(weights.sum())


def test_a_thousand_units_are_solved_and_proven_in_a_second() -> None:
    sizes, losses, weights = realistic(1000)
    begin = time.perf_counter()
    found = allocate(sizes, losses, int(3.6 * weights / 8))
    assert time.perf_counter() - begin < 5
    assert 0 <= found.gap < 1e-6
    assert int(3.6 * weights / 8) - found.nbytes < 1000  # the budget is spent


def test_more_bytes_cost_less_and_less_each() -> None:
    sizes, losses, weights = realistic(60)
    found = [allocate(sizes, losses, int(rate * weights / 8)) for rate in (3.25, 3.5, 4, 5, 6)]
    assert [a.loss for a in found] == sorted((a.loss for a in found), reverse=True)
    assert [a.price for a in found] == sorted((a.price for a in found), reverse=True)
    # The price is what a byte is worth: a small step up saves about that much.
    small = allocate(sizes, losses, int(4 * weights / 8) + weights // 200)
    saved = (found[2].loss - small.loss) / (small.nbytes - found[2].nbytes)
    assert saved == pytest.approx(found[2].price, rel=0.25)


def test_the_same_problem_has_the_same_answer() -> None:
    sizes, losses, weights = realistic(200, seed=3)
    first, second = (allocate(sizes, losses, int(3.5 * weights / 8)) for _ in range(2))
    assert first == second


def test_a_budget_for_everything_buys_everything_at_no_price() -> None:
    found = allocate([[1, 5], [2, 3]], [[1.0, 0.5], [4.0, 0.0]], 100)
    assert found.choices == (1, 1)
    assert found.price == 0
    assert found.gap == 0


def test_too_small_a_budget_says_what_the_least_is() -> None:
    with pytest.raises(PlanError, match="smallest choice takes 3 bytes"):
        allocate([[1, 5], [2, 3]], [[1.0, 0.5], [4.0, 0.0]], 2)
