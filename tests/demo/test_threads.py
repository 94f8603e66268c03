"""The fastest number of threads is found, used, and put back."""

from __future__ import annotations

import pytest
import torch

from milo.demo import threads
from milo.demo.threads import fastest_threads


@pytest.fixture
def seconds_by_count(monkeypatch):
    """A machine of eight threads whose trials take the given seconds; the counts tried are recorded."""
    state = {"count": 8, "tried": []}
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["count"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(count=n))

    def use(table: dict[int, float]) -> dict:
        def seconds(trial):
            state["tried"].append(state["count"])
            return table[state["count"]]

        monkeypatch.setattr(threads, "_seconds", seconds)
        return state

    return use


@pytest.mark.parametrize(
    ("table", "chosen", "tried"),
    [
        ({1: 1.0, 2: 10.0}, 1, {1, 2}),
        ({1: 1.0, 2: 0.6, 4: 0.7}, 2, {1, 2, 4}),
        ({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.3}, 8, {1, 2, 4, 8}),
    ],
)
def test_the_climb_stops_where_it_gets_slower(seconds_by_count, table, chosen, tried):
    state = seconds_by_count(table)
    with fastest_threads(lambda: None) as count:
        assert count == state["count"] == chosen
    assert set(state["tried"]) == tried
    assert state["count"] == 8


def test_the_number_is_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), fastest_threads(lambda: None):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
