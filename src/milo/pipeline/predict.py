"""How long a plan will take on this machine, from two seconds of trying.

Matrices of one shape, encoding and rank take the same time, so a plan has few *kinds* of work. For each kind a small
synthetic stack is solved with one round and with three, which gives the cost of a round and of all that happens once;
the rest is multiplication. A matrix too large to try is scaled down by s in both sides and in rank: work on every
weight shrinks by s², matrix products and orthogonalisations by s³, and the former is known from solving without a
compensator (at both sizes, since large arrays cost more a weight: the system maps them anew each time). Kinds that
the time does not suffice for get the measured ones' seconds a pass.

On a GPU a trial is as large as an item, since a small one would measure how long launches take, and what it measures
has run before, with all its rounds: the first time compiles kernels and lets libraries choose, which happens once in a
run and must not be multiplied.

The items' times are then dealt out as the pool does it. Reading overlaps with solving, so the longer of the two is
told; its rate is sampled from the source, where the operating system's cache may flatter it. Writing is not predicted.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any

import torch

from milo.checkpoint.source import Checkpoint
from milo.format.matrix import Encoding
from milo.pipeline.devices import parallel_items
from milo.pipeline.job import on_device
from milo.pipeline.lane import AHEAD
from milo.pipeline.memory import host_now, host_peak
from milo.pipeline.planning import peak_bytes
from milo.pipeline.schedule import in_order, passes
from milo.pipeline.work import Item, one_thread, piece_size, work_items
from milo.plan.plan import Plan
from milo.solve.stack import buckets, solve_stack

BUDGET = 2.0  # seconds; on a GPU without those of the first times
_SAMPLE = 1 << 18  # weights of a trial on a CPU: few enough for dozens of them
_PLAIN = 1 << 23  # weights of a trial without a compensator
_READ = 1 << 26  # bytes read to see how fast the source is


@dataclass(frozen=True)
class Kind:
    """Matrices that take the same time."""

    shape: tuple[int, int]
    encoding: Encoding
    grid: str
    rank: int


@dataclass(frozen=True)
class Prediction:
    """What a run will take.

    Attributes:
        seconds: wall time of reading, solving and copying; planning excluded.
        solve_seconds: of all workers together.
        read_seconds: for reading the source once.
        workers: items at a time, over all devices.
        host_bytes: peak memory of this process (or of each worker process, if there are several).
        gpu_bytes: peak memory of each GPU; 0 on a CPU.
    """

    seconds: float
    solve_seconds: float
    read_seconds: float
    workers: int
    host_bytes: int
    gpu_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def predict(source: Checkpoint, plan: Plan, devices: Sequence[str], workers: int | None = None) -> Prediction:
    """Try a little of everything that a plan does.

    Args:
        source: where the weights are.
        plan: what is to be done.
        devices: where it will be solved (`milo.pipeline.devices.visible_devices`).
        workers: CPU threads.
    """
    device, at_once = devices[0], parallel_items(devices, workers)
    items = in_order(work_items(plan, {}, device), plan)
    work = {item: kinds_of(item, plan, device) for item in items}
    seconds = _measure(list(work.values()), plan.rounds, device, at_once)
    durations = [sum(count * seconds[kind] for kind, count in kinds.items()) for kinds in work.values()]
    lanes = at_once * len(devices)
    reading = sum(info.nbytes for info in source.tensors.values()) / _read_rate(source)
    largest = max(len(item.members) * prod(plan.by_name[item.row].shape) for item in items)
    on_gpu = device != "cpu"
    if on_gpu:  # PyTorch's page-locked buffers are powers of two
        host = max(host_peak(), host_now() + AHEAD * (1 << (2 * largest - 1).bit_length()))
        torch.cuda.empty_cache()  # what the trials took is not the run's
        torch.cuda.reset_peak_memory_stats(device)
    else:
        host = host_peak() + peak_bytes(plan, device, at_once)
    return Prediction(
        max(makespan(durations, lanes), reading),
        sum(durations),
        reading,
        lanes,
        host,
        peak_bytes(plan, device) if on_gpu else 0,
    )


def kinds_of(item: Item, plan: Plan, device: str = "cpu") -> Counter[Kind]:
    """The kinds of an item's matrices; those that `solve_stack` fits together count with their highest rank."""
    row = plan.by_name[item.row]
    ranks = row.ranks[item.first : item.stop]
    together = buckets(ranks, min(row.shape), torch.device(device).type)
    highest = [max(ranks[member] for member in members) for members in together]
    return Counter(
        {
            Kind(row.shape, row.encoding, row.grid, rank): len(members)
            for rank, members in zip(highest, together, strict=True)
        }
    )


def makespan(durations: Sequence[float], workers: int) -> float:
    """When the last of some items is finished if each goes to the first worker that is free."""
    free = [0.0] * workers
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def _measure(items: Sequence[Counter[Kind]], rounds: int, device: str, threads: int) -> dict[Kind, float]:
    """Seconds of one matrix of every kind."""
    work: Counter[Kind] = sum(items, Counter())
    together = {kind: max(item[kind] for item in items) for kind in work}
    expected = {kind: prod(kind.shape) * passes(kind.rank, rounds) for kind in work}
    order = sorted(work, key=lambda kind: -expected[kind] * work[kind])
    measured: dict[Kind, float] = {}
    deadline = time.perf_counter() + BUDGET
    with ThreadPoolExecutor(threads, "try", initializer=torch.set_num_threads, initargs=(1,)) as pool, one_thread():
        trial = _Trial(pool, threads, device)
        for kind in order:
            measured[kind] = trial.seconds(kind, rounds, together[kind])
            if time.perf_counter() - trial.first_times > deadline:
                break
    rate = sum(measured.values()) / sum(expected[kind] for kind in measured)
    return {kind: measured.get(kind, expected[kind] * rate) for kind in work}


class _Trial:
    """Solves synthetic stacks on as many threads as the run will use, since they share the machine's memory."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int, device: str) -> None:
        self.pool = pool
        self.threads = threads
        self.device = device
        self.on_gpu = device != "cpu"
        self.sample = piece_size(device) if self.on_gpu else _SAMPLE
        self.first_times = 0.0  # seconds spent on them
        self._warm: set[Any] = set()
        self._plain: dict[Any, float] = {}  # seconds a weight of solving without a compensator

    def seconds(self, kind: Kind, rounds: int, together: int) -> float:
        """Of one matrix, if `together` of them are solved in one item."""
        weights = prod(kind.shape)
        plain = self._plainly(kind, min(together * weights, max(_PLAIN, self.sample))) * weights
        if kind.rank == 0:
            return plain
        scale = max(1.0, sqrt(weights / self.sample))
        shape = _shrunk(kind, scale)
        stack = max(1, min(together, self.sample // prod(shape)))
        rank = max(1, min(round(kind.rank / scale), *shape))
        one, three = (self._time(kind, shape, stack, rank, n) / stack for n in (1, 3))
        a_round = (three - one) / 2
        everywhere = self._plainly(kind, stack * prod(shape)) * prod(shape)

        def scaled(seconds: float) -> float:
            return plain * min(1.0, seconds / everywhere) + max(0.0, seconds - everywhere) * scale**3

        return scaled(one) + (rounds - 1) * scaled(a_round)

    def _plainly(self, kind: Kind, weights: int) -> float:
        """Seconds a weight of solving about so many without a compensator."""
        key = (kind.encoding, kind.grid, weights.bit_length())
        if key not in self._plain:
            shape = _shrunk(kind, max(1.0, sqrt(prod(kind.shape) / weights)))
            stack = max(1, weights // prod(shape))
            self._plain[key] = self._time(kind, shape, stack, 0, 1) / (stack * prod(shape))
        return self._plain[key]

    def _time(self, kind: Kind, shape: tuple[int, int], stack: int, rank: int, rounds: int) -> float:
        generator = torch.Generator(self.device).manual_seed(0)
        weight = torch.randn(stack, *shape, generator=generator, device=self.device).mul_(0.02)

        def solve(rounds: int) -> float:
            with on_device(self.device):
                begin = time.perf_counter()
                solved = solve_stack(weight, [rank] * stack, kind.encoding, kind.grid, rounds, "a trial")
                solved[-1].tensors["weight_packed"].cpu()  # waits for a GPU
                return time.perf_counter() - begin

        if self.on_gpu:
            if (shapes := (kind.encoding, kind.grid, shape, stack, rank)) not in self._warm:
                self.first_times += self._on_all(solve, 3)
                self._warm.add(shapes)
        elif (key := (kind.encoding, kind.grid, rank > 0)) not in self._warm:  # lazy initialisation
            solve(rounds)
            self._warm.add(key)
        return self._on_all(solve, rounds)

    def _on_all(self, solve: Callable[[int], float], rounds: int) -> float:
        return sum(self.pool.map(solve, [rounds] * self.threads)) / self.threads


def _shrunk(kind: Kind, scale: float) -> tuple[int, int]:
    n, k = kind.shape
    return max(1, round(n / scale)), max(min(k, kind.encoding.group_size), round(k / scale))


def _read_rate(source: Checkpoint) -> float:
    """Bytes a second at which the source's larger files give a few megabytes."""
    files = {info.file: info.end for info in source.tensors.values()}
    done, begin = 0, time.perf_counter()
    for file in sorted(files, key=lambda file: -files[file])[:4]:
        with file.open("rb", buffering=0) as stream:
            stream.seek(files[file] // 2)
            done += len(stream.read(_READ // 4))
    return max(done, 1) / (time.perf_counter() - begin)
