"""Work items: how a group of matrices is read and solved in pieces of bounded size.

A piece is at most `PIECE` elements (but at least one matrix), whatever the machine: its size decides which matrices
share a batch, and so the last bits of the result. On a CPU a piece is solved by one thread, for the same reason, and
the cores share the work by solving different pieces (`one_thread`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from milo.checkpoint.inventory import Group, Kind
from milo.checkpoint.source import Checkpoint
from milo.plan.plan import Row
from milo.solve.stack import Solved, solve_stack

PIECE = 1 << 24
# Measured peak of `solve_stack` in float32 copies of its input (the source tensor and the result included).
COPIES = 8


def worker_count(device: str) -> int:
    """Pieces that are solved at the same time: the cores of a CPU (up to 8, then Python is the limit), one on a GPU."""
    return min(os.cpu_count() or 1, 8) if device == "cpu" else 1


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations run on the calling thread only: same bits on every machine, no oversubscription."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pieces(row: Row) -> Iterator[range]:
    """Consecutive members that are solved together."""
    size = max(1, PIECE // (row.shape[0] * row.shape[1]))
    for first in range(0, len(row.ranks), size):
        yield range(first, min(first + size, len(row.ranks)))


def solve_piece(weight: torch.Tensor, row: Row, members: range, rounds: int) -> list[Solved]:
    """Solve `weight [len(members), N, K]` as the plan's row says."""
    ranks = [row.ranks[m] for m in members]
    return solve_stack(weight, ranks, row.encoding, row.grid, rounds, row.name)


def read_members(checkpoint: Checkpoint, group: Group, members: range) -> torch.Tensor:
    """Source weights of some members as one stack `[len(members), N, K]`, source dtype."""
    if group.kind is Kind.STACK:
        stack = checkpoint.read(group.members[0])[members.start : members.stop]
        return stack.mT if group.transposed else stack
    return torch.stack([checkpoint.read(group.members[m]) for m in members])


def read_matrices(checkpoint: Checkpoint, group: Group) -> Iterator[torch.Tensor]:
    """The matrices of a group one by one, `[N, K]`."""
    for member in range(group.count):
        yield read_members(checkpoint, group, range(member, member + 1))[0]


def piece_bytes(row: Row) -> int:
    """Peak bytes while the largest piece of a row is solved."""
    longest = max(len(members) for members in pieces(row))
    return longest * row.shape[0] * row.shape[1] * 4 * COPIES
