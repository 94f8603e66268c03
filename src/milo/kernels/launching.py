"""What every launch is told in the same way, and the memory of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from milo.kernels.layout import PackedMatrix
from milo.kernels.parameters import Matrix, Routing

T = TypeVar("T")

CHOICE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the router's weights; kernels know the position


class Workspace:
    """Buffers of one call, from one allocation of PyTorch's pool (freed in stream order when the call returns)."""

    def __init__(self, device: torch.device, **sizes: int) -> None:
        self._offsets: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            self._offsets[name] = total
            total += -(-size // 256) * 256
        self._memory = torch.empty(total, dtype=torch.uint8, device=device)

    def __getitem__(self, name: str) -> int:
        return self._memory.data_ptr() + self._offsets[name]


def all_at_once(work: Callable[[T], object], items: Sequence[T]) -> None:
    """`work(item)` for every item, a thread each: the compiler runs without Python's lock."""
    with ThreadPoolExecutor(max(1, len(items)), "nvrtc") as pool:
        list(pool.map(work, items))


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor begins; None for none."""
    return None if tensor is None else tensor.data_ptr()


def routing(ids: torch.Tensor | None, expert_map: torch.Tensor | None, pairs: int, experts: int) -> Routing:
    """The router's choices; `ids` is None where one expert takes every row."""
    return Routing(
        address(ids), address(expert_map), int(ids is not None and ids.dtype == torch.int64),
        0 if expert_map is None else expert_map.shape[0], pairs, experts,
    )  # fmt: skip


def matrices(weight: PackedMatrix) -> tuple[Matrix, Matrix]:
    """The codes and metadata of the weights, and those of V."""
    k_tiles = weight.codes.shape[2]
    shift = int(weight.group_size == 128)  # a record of metadata covers two tiles
    return (
        Matrix(weight.codes.data_ptr(), weight.meta.data_ptr(), k_tiles, weight.meta.shape[2], shift),
        Matrix(weight.v_codes.data_ptr(), weight.v_meta.data_ptr(), k_tiles, k_tiles, 0),
    )
