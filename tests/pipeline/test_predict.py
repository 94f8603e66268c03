"""Predictions: exact where the machine obeys the laws that they assume, and sane on the one that runs the tests."""

from __future__ import annotations

from contextlib import nullcontext
from math import prod
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from milo.checkpoint.inventory import Kind as Standing
from milo.checkpoint.roles import Role
from milo.format.matrix import Encoding
from milo.integrations.transformers.source import open_source
from milo.pipeline import predict as module
from milo.pipeline.planning import plan_source
from milo.pipeline.predict import Kind, kinds_of, makespan, predict
from milo.pipeline.work import work_items
from milo.plan.plan import Plan, Row
from milo.plan.recipe import custom_recipe

A_WEIGHT, A_PRODUCT, ONCE = 3e-8, 2e-10, 5e-10  # seconds of the machine below


class Machine:
    """Its clock is moved by solving and by nothing else; every thread has its own, or one would time another's work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: float = 1.0) -> None:
        self.slow, self.main = slow, get_ident()
        self.clocks: dict[int, float] = {}
        self.solved: list[tuple[tuple[int, ...], int]] = []
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=self.now))
        monkeypatch.setattr(module, "solve_stack", self.solve)
        monkeypatch.setattr(module, "_read_rate", lambda source: 1e12)

    def now(self) -> float:
        """This thread's time; the one that waits for the others has the latest of theirs."""
        if get_ident() == self.main:
            return max([*self.clocks.values()], default=0.0)
        return self.clocks.setdefault(get_ident(), 0.0)

    def matrix(self, shape: tuple[int, ...], rank: int, rounds: int) -> float:
        """Seconds."""
        weights = prod(shape) * self.slow
        if rank == 0:
            return weights * A_WEIGHT
        return weights * (rounds * (A_WEIGHT + A_PRODUCT * rank) + ONCE * rank)

    def solve(
        self, weight: torch.Tensor, ranks: list[int], encoding: Encoding, grid: str, rounds: int, name: str
    ) -> Any:
        self.solved.append((tuple(weight.shape), ranks[0]))
        spent = len(ranks) * self.matrix(tuple(weight.shape[1:]), ranks[0], rounds)
        self.clocks[get_ident()] = self.now() + spent
        return [SimpleNamespace(tensors={"weight_packed": torch.zeros(1)})]


def row(name: str, shape: tuple[int, int], ranks: list[int]) -> Row:
    return Row(name, Role.EXPERT, Standing.EXPERTS, shape, tuple(ranks), Encoding(), "hqq")


def test_a_machine_that_obeys_the_laws_is_predicted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    # Attention of a large model is scaled down by four, small experts are tried as they are.
    plan = Plan((row("a.*", (2048, 2048), [512, 512]), row("e.*", (256, 128), [0] * 6 + [8, 8])), "x", "y", 20)
    told = predict(SimpleNamespace(tensors={}), plan, ("cpu",), 1)  # type: ignore[arg-type]
    exact = 2 * machine.matrix((2048, 2048), 512, 20) + 6 * machine.matrix((256, 128), 0, 1)
    exact += 2 * machine.matrix((256, 128), 8, 20)
    assert told.seconds == told.solve_seconds == pytest.approx(exact, rel=1e-3)
    assert max(prod(shape) for shape, rank in machine.solved if rank) <= 1 << 18
    assert told.workers == 1
    assert told.gpu_bytes == 0


def test_two_workers_share_and_reading_may_be_the_longer_part(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    plan = Plan((row("e.*", (4096, 4096), [0] * 6),), "x", "y", 20)  # six items
    tensors = {"x": SimpleNamespace(nbytes=2e12)}
    one, two = (predict(SimpleNamespace(tensors={}), plan, ("cpu",), n) for n in (1, 2))  # type: ignore[arg-type]
    assert two.seconds == pytest.approx(one.seconds / 2, rel=1e-3)
    assert two.host_bytes > one.host_bytes
    assert predict(SimpleNamespace(tensors=tensors), plan, ("cpu",), 2).seconds == pytest.approx(2)  # type: ignore[arg-type]


def test_a_slow_machine_stops_trying_after_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, slow=1000)
    plan = Plan(tuple(row(f"{i}.*", (64 * i, 512), [i, i]) for i in range(1, 20)), "x", "y", 20)
    told = predict(SimpleNamespace(tensors={}), plan, ("cpu",), 1)  # type: ignore[arg-type]
    assert len({shape for shape, _ in machine.solved}) < 10
    exact = sum(2 * machine.matrix(r.shape, r.ranks[0], 20) for r in plan.rows)
    assert told.seconds == pytest.approx(exact, rel=0.3)


class Gpu(Machine):
    """The same, but for the first time that a stack goes through a round: kernels are compiled, libraries choose."""

    FIRST = 7.0  # seconds

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch, slow=1e-4)
        self.known: set[Any] = set()
        randn = torch.randn
        # Stacks of many gigabytes without an element, on the CPU: the machine looks at their shape only.
        monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
        monkeypatch.setattr(
            torch, "randn", lambda *shape, generator, device: randn(1).expand(shape).as_subclass(Untouched)
        )
        monkeypatch.setattr(module, "on_device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def solve(
        self, weight: torch.Tensor, ranks: list[int], encoding: Encoding, grid: str, rounds: int, name: str
    ) -> Any:
        for number in range(min(rounds, 3)):  # the second round brings new kernels, and so does the third
            if (key := (tuple(weight.shape), ranks[0], number)) not in self.known:
                self.known.add(key)
                self.clocks[get_ident()] = self.now() + self.FIRST
        return super().solve(weight, ranks, encoding, grid, rounds, name)


class Untouched(torch.Tensor):
    def mul_(self, factor: float) -> Untouched:  # type: ignore[override]
        return self


def test_what_a_gpu_does_once_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation and the like neither count with the rounds nor use up the time for trying."""
    machine = Gpu(monkeypatch)
    experts = [16] * 90 + [100] * 30
    rows = (row("e.*", (1408, 2048), experts), *(row(f"{i}.*", (2048, 2048 + 64 * i), [512]) for i in range(8)))
    plan = Plan(rows, "x", "y", 20)
    told = predict(SimpleNamespace(tensors={}), plan, ("cuda:0",))  # type: ignore[arg-type]
    exact = sum(machine.matrix(r.shape, 512, 20) for r in rows[1:])
    # 46 experts an item: the first holds none of rank 100, with which the others are fitted.
    assert 2**27 // (1408 * 2048) == 46
    exact += 46 * machine.matrix((1408, 2048), 16, 20) + 74 * machine.matrix((1408, 2048), 100, 20)
    assert told.solve_seconds == pytest.approx(exact, rel=1e-3)
    assert told.solve_seconds < machine.FIRST
    assert {shape for shape, rank in machine.solved if rank} == {
        (46, 1408, 2048),
        *((1, *r.shape) for r in rows[1:]),
    }
    assert told.gpu_bytes == 46 * 1408 * 2048 * 32
    assert told.workers == 1


def test_kinds_follow_the_buckets_that_are_fitted_together() -> None:
    plan = Plan((row("e.*", (64, 96), [0, 0, 5, 7, 4, 9]),), "x", "y", 3)
    (item,) = work_items(plan, {})
    kinds = {kind.rank: count for kind, count in kinds_of(item, plan).items()}
    assert kinds == {0: 2, 7: 3, 9: 1}
    assert Kind((64, 96), Encoding(), "hqq", 7) in kinds_of(item, plan)


@pytest.mark.parametrize(
    ("durations", "workers", "end"), [([5, 4, 3], 1, 12), ([5, 4, 3], 2, 7), ([1], 4, 1), ([], 3, 0)]
)
def test_makespan(durations: list[float], workers: int, end: float) -> None:
    assert makespan(durations, workers) == end


def test_this_machine(mixtral_folder: Path) -> None:
    source = open_source(str(mixtral_folder))
    plan = plan_source(source, custom_recipe("milo-s1", source.checkpoint.config, ranks="dense:8+kurtosis:3"))
    told = predict(source.checkpoint, plan, ("cpu",), 2)
    assert told.read_seconds > 0
    assert told.seconds <= told.solve_seconds < 60
    assert told.to_json()["workers"] == 2
