"""One compression as its workers see it: read an item, solve it, write it, say what was done.

A `Job` holds no open file and no weights, so that it can be sent to another process or another machine. The three
steps are separate methods because a GPU overlaps them (`milo.pipeline.lane`); a CPU thread takes them in turn.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from milo.checkpoint.inventory import Group
from milo.checkpoint.source import Checkpoint
from milo.checkpoint.writer import TensorWriter
from milo.errors import DeviceError
from milo.pipeline.layout import copied_spec, places
from milo.pipeline.memory import Peak
from milo.pipeline.work import Item, Stack, read_members, solve_piece
from milo.plan.plan import Plan
from milo.solve.stack import Solved


@dataclass(frozen=True)
class Measured:
    """What the report says of one solved matrix; see `milo.solve.stack.Solved`."""

    error: float
    error_unrounded: float
    rounds: int


@dataclass(frozen=True)
class Done:
    """A finished item.

    Attributes:
        item: which.
        sha256: of the bytes it wrote, in the order of `places`.
        matrices: one a member; empty for copies.
        seconds: what reading, solving and writing took.
        peak: memory of the process that did it, so far; None if an earlier run did it.
    """

    item: Item
    sha256: str
    matrices: tuple[Measured, ...] = ()
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    peak: Peak | None = None

    def to_journal(self) -> dict[str, Any]:
        """Its line in the journal."""
        found = [[m.error, m.error_unrounded, m.rounds] for m in self.matrices]
        return {"item": self.item.key, "sha256": self.sha256, "matrices": found}

    @classmethod
    def from_journal(cls, item: Item, entry: Mapping[str, Any]) -> Done:
        return cls(item, entry["sha256"], tuple(Measured(*values) for values in entry["matrices"]))


@dataclass(frozen=True)
class Job:
    """What every worker needs.

    Attributes:
        source: where weights are read.
        groups: of the inventory, by name.
        plan: what to do with them.
        copied: names of the tensors that are copied.
        place: where results go.
        importance: of the in-features, float32 `[E, K]` by group name, for the groups where it is known.
    """

    source: Checkpoint
    groups: Mapping[str, Group]
    plan: Plan
    copied: tuple[str, ...]
    place: TensorWriter
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def carry(self, item: Item, device: str = "cpu", scribe: Executor | None = None) -> Done:
        """Read, solve and write one item in turn.

        Args:
            item: which.
            device: where to solve.
            scribe: who writes, if not the calling thread.
        """
        begin = time.perf_counter()
        stack = self.read(item)
        read = time.perf_counter()
        solved = self.solve(item, stack, device)
        solving = time.perf_counter()
        sha256 = scribe.submit(self.write, item, solved).result() if scribe else self.write(item, solved)
        seconds = (read - begin, solving - read, time.perf_counter() - solving)
        return self.done(item, sha256, solved, seconds, device)

    def read(self, item: Item, pinned: bool = False) -> Stack | None:
        """The item's source weights; None for copies, which pass through no memory of ours."""
        return read_members(self.source, self.groups[item.row], item.members, pinned) if item.row else None

    @torch.no_grad()
    def solve(self, item: Item, stack: Stack | None, device: str) -> list[Solved]:
        """The item's matrices, their tensors on `device`.

        Raises:
            DeviceError: the device has too little memory.
            WeightError: NaN or Inf in the weights.
        """
        if stack is None:
            return []
        row = self.plan.by_name[item.row]
        try:
            with on_device(device):
                importance = self.importance.get(item.row)
                return solve_piece(stack.on(device), row, item.members, self.plan.rounds, importance)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{device} has too little memory for {item.key} ({len(item.members)} × {row.shape}); free some of it, "
                "or solve on another device (--devices)"
            ) from error

    def write(self, item: Item, solved: list[Solved]) -> str:
        """Put the item's bytes in their places; returns their SHA-256."""
        digest = hashlib.sha256()
        if not item.row:
            for name in self._copied(item):
                for data in self._copy(name):
                    digest.update(data)
            return digest.hexdigest()
        for place in places(self.plan.by_name[item.row], item.members):
            tensor = solved[place.member - item.first].tensors[place.suffix]
            whole = tensor[None] if len(place.spec.shape) > tensor.ndim else tensor
            digest.update(self.place.write(place.name, whole, place.first_row))
        return digest.hexdigest()

    def done(
        self, item: Item, sha256: str, solved: list[Solved], seconds: tuple[float, float, float], device: str
    ) -> Done:
        """The record of a finished item."""
        matrices = tuple(Measured(s.error, s.error_unrounded, s.rounds) for s in solved)
        return Done(item, sha256, matrices, seconds, Peak.now(device))

    def is_stored(self, done: Done) -> bool:
        """Whether the bytes on disk are those that the item wrote."""
        digest = hashlib.sha256()
        for name, first_row, nbytes in self.extent(done.item):
            for data in self.place.stored(name, first_row, nbytes):
                digest.update(data)
        return digest.hexdigest() == done.sha256

    def extent(self, item: Item) -> Iterator[tuple[str, int, int]]:
        """What an item writes: tensor, first row, bytes."""
        if item.row:
            for place in places(self.plan.by_name[item.row], item.members):
                yield place.name, place.first_row, place.spec.nbytes
        else:
            for name in self._copied(item):
                yield name, 0, copied_spec(self.source, name).nbytes

    def weights(self, item: Item) -> int:
        """Compressed weights of an item."""
        if not item.row:
            return 0
        n, k = self.plan.by_name[item.row].shape
        return len(item.members) * n * k

    def _copied(self, item: Item) -> tuple[str, ...]:
        return self.copied[item.first : item.stop]

    def _copy(self, name: str) -> Iterator[bytes | memoryview]:
        info = self.source.tensors[name]
        if info.dtype == "F8_E4M3":
            yield self.place.write(name, self.source.read(name))
        else:
            yield from self.place.copy(name, info.file, info.begin, info.end)


def on_device(device: str) -> AbstractContextManager[object]:
    """Makes a GPU the current one, which kernels are launched on."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
