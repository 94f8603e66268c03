"""Work items: how a model is read, solved and written in portions of bounded size.

An item is some members of one group of matrices, at most `PIECE` elements (but at least one matrix), or some of the
tensors that are only copied. Its size is fixed whatever the machine, since it decides which matrices share a batch,
and so the last bits of the result; on a CPU an item is solved by one thread (`one_thread`), for the same reason. So
items may be solved in any order by any number of threads, GPUs or machines, and the files are the same.

The size differs between *kinds* of device, whose last bits differ anyway and which never share a run. A CPU holds an
item a core, so an item is small. A GPU holds one: it is large, because a round of a small stack takes as long as its
some 50 launches (DeepSeek-MoE-16B, 20 rounds on an H100, with 75 launches: 3.3 s a layer at 2²⁴, 1.5 s at 2²⁶). At 2²⁷
an item is 268 MB of bfloat16, which is what bounds it from above: the host holds two of them in page-locked memory.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch

from milo.checkpoint.inventory import Group, Kind
from milo.checkpoint.source import TORCH_DTYPES, Checkpoint, multiply_out
from milo.plan.plan import Plan, Row
from milo.solve.stack import Solved, solve_stack

PIECE = {"cpu": 1 << 24, "cuda": 1 << 27}  # weights, by type of device
COPIED = 1 << 28  # bytes of copied tensors in an item (or a single one)
# Measured peak of `solve_stack` in float32 copies of its input (the source tensor and the result included); a GPU took
# 4.6 for DeepSeek-MoE-16B's experts and up to 8.4 for a matrix of Mixtral-8x7B.
COPIES = 8


@dataclass(frozen=True)
class Item:
    """A portion of the work, the same on every machine.

    Attributes:
        row: name of the plan's row; empty for tensors that are copied.
        first: the first member (of the row, or of the list of copied tensors).
        stop: one past the last.
    """

    row: str
    first: int
    stop: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.row}[{self.first}:{self.stop}]"

    @classmethod
    def of(cls, key: str) -> Item:
        """The item of this name."""
        row, _, members = key.removesuffix("]").rpartition("[")
        first, _, stop = members.partition(":")
        return cls(row, int(first), int(stop))

    @property
    def members(self) -> range:
        return range(self.first, self.stop)


@dataclass(frozen=True)
class Stack:
    """Source weights of some members, `[E, N, K]` as stored, and the block scales of FP8 weights.

    The scales are multiplied in on the device that solves: a CPU thread would be slower than the GPU it feeds.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None = None
    block: Sequence[int] = (128, 128)

    def on(self, device: str) -> torch.Tensor:
        """The weights on a device, bfloat16 where they were FP8."""
        weight = self.weight.to(device, non_blocking=True)
        if self.scales is None:
            return weight
        return multiply_out(weight, self.scales.to(device), self.block)


def piece_size(device: str) -> int:
    """Weights of an item at most (but at least one matrix)."""
    return PIECE.get(torch.device(device).type, PIECE["cpu"])


def work_items(plan: Plan, copied: Mapping[str, int], device: str = "cpu") -> list[Item]:
    """Everything that is to be done, in the order of the output.

    Args:
        plan: what is compressed.
        copied: the other tensors and their bytes.
        device: of the kind that will solve.
    """
    items = []
    first = size = 0
    for position, nbytes in enumerate(copied.values()):
        if position > first and size + nbytes > COPIED:
            items.append(Item("", first, position))
            first, size = position, 0
        size += nbytes
    if copied:
        items.append(Item("", first, len(copied)))
    items += [Item(row.name, members.start, members.stop) for row in plan.rows for members in pieces(row, device)]
    return items


def left_over(items: Iterable[Item], done: Iterable[Item]) -> list[Item]:
    """What of `items` is in none of `done`, which may have been cut for another kind of device."""
    finished: dict[str, set[int]] = defaultdict(set)
    for item in done:
        finished[item.row].update(item.members)
    left = []
    for item in items:
        for is_done, run in groupby(item.members, finished[item.row].__contains__):
            if not is_done:
                members = list(run)
                left.append(Item(item.row, members[0], members[-1] + 1))
    return left


def worker_count(device: str) -> int:
    """Pieces that are solved at the same time: the cores of a CPU (up to 8, then Python is the limit), one on a GPU."""
    if device != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations run on the calling thread only: same bits on every machine, no oversubscription."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pieces(row: Row, device: str = "cpu") -> Iterator[range]:
    """Consecutive members that are solved together on a device."""
    size = max(1, piece_size(device) // (row.shape[0] * row.shape[1]))
    for first in range(0, len(row.ranks), size):
        yield range(first, min(first + size, len(row.ranks)))


def solve_piece(
    weight: torch.Tensor, row: Row, members: range, rounds: int, importance: torch.Tensor | None = None
) -> list[Solved]:
    """Solve `weight [len(members), N, K]` as the plan's row says; `importance [E, K]` is of all the row's members."""
    ranks = [row.ranks[m] for m in members]
    ours = None if importance is None else importance[members.start : members.stop]
    return solve_stack(weight, ranks, row.encoding, row.grid, rounds, row.name, ours)


def read_members(checkpoint: Checkpoint, group: Group, members: range, pinned: bool = False) -> Stack:
    """Source weights of some members.

    Args:
        checkpoint: where they are.
        group: whose members.
        members: which.
        pinned: into page-locked memory, from which a GPU copies without waiting.
    """
    names = [group.members[0]] if group.kind is Kind.STACK else [group.members[m] for m in members]
    stored = checkpoint.tensors[names[0]]
    shape = stored.shape[-2:]
    dtype = TORCH_DTYPES[stored.dtype]
    # The device is named because transformers calls this while its default is `meta`.
    weight = torch.empty(len(members), *shape, dtype=dtype, device="cpu", pin_memory=pinned)
    if group.kind is Kind.STACK:
        checkpoint.read_into(names[0], weight, members.start)
    else:
        for name, matrix in zip(names, weight, strict=True):
            checkpoint.read_into(name, matrix)
    scales = None
    if stored.dtype == "F8_E4M3":
        found = [checkpoint.block_scales(name) for name in names]
        if group.kind is Kind.STACK:
            scales = found[0][members.start : members.stop]  # type: ignore[index]
        else:
            scales = torch.stack(found)  # type: ignore[arg-type]
    if group.transposed:
        weight, scales = weight.mT, scales if scales is None else scales.mT
    block = checkpoint.scale_block
    return Stack(weight, scales, block[::-1] if group.transposed else block)


def read_matrix(checkpoint: Checkpoint, group: Group, member: int) -> torch.Tensor:
    """One matrix of a group, `[N, K]`."""
    return read_members(checkpoint, group, range(member, member + 1)).on("cpu")[0]


def piece_bytes(row: Row, device: str = "cpu") -> int:
    """Peak bytes while the largest piece of a row is solved on a device."""
    longest = max(len(members) for members in pieces(row, device))
    return longest * row.shape[0] * row.shape[1] * 4 * COPIES
