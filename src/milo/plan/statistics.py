"""Statistics of weights that rank policies look at: the excess kurtosis of each matrix.

`κ = mean((w − μ)⁴) / σ⁴ − 3`, with σ the sample standard deviation as in the official code (`torch.std`). Taken in
float64, in chunks that stay in a core's cache: arrays of a whole matrix would be written to memory and mapped anew a
step, which takes sixteen times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from milo.checkpoint.inventory import Group
from milo.errors import WeightError

# Of a group, what gives the matrix `[N, K]` of a member.
Reader = Callable[[Group], Callable[[int], torch.Tensor]]
# Applies a function to each of some members, in order, as `map` does.
Mapper = Callable[[Callable[[int], float], Iterable[int]], Iterable[float]]

# Elements of a chunk. A GPU takes few large ones, because each is some launches.
_CPU_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 26


def excess_kurtosis(weight: torch.Tensor) -> float:
    """Excess kurtosis of all elements of `weight`; 0 for a constant matrix."""
    flat = weight.reshape(-1)
    chunks = flat.split(_CPU_CHUNK if flat.device.type == "cpu" else _GPU_CHUNK)
    # Exact where all elements are equal: a multiple of a float32 takes less than the 53 bits of a float64.
    mean = torch.stack([chunk.sum(dtype=torch.float64) for chunk in chunks]).sum() / flat.numel()
    seconds, fourths = [], []
    for chunk in chunks:
        square = chunk.double().sub_(mean).square_()
        seconds.append(square.sum())
        fourths.append(torch.dot(square, square))
    variance = torch.stack(seconds).sum() / (flat.numel() - 1)
    if variance == 0:
        return 0.0
    return (torch.stack(fourths).sum() / flat.numel() / variance.square() - 3).item()


class WeightStatistics:
    """Kurtosis of groups, each read once.

    Args:
        read: see `Reader`.
        on_group: called with each group's name before it is read (progress).
        mapper: see `Mapper`; the `map` of an executor takes several members at a time.
    """

    def __init__(self, read: Reader, on_group: Callable[[str], None] = lambda name: None, mapper: Mapper = map) -> None:
        self._read = read
        self._on_group = on_group
        self._map = mapper
        self._known: dict[str, list[float]] = {}

    def kurtosis(self, group: Group) -> list[float]:
        """Excess kurtosis of each member.

        Raises:
            WeightError: NaN or Inf in a matrix.
        """
        if group.name not in self._known:
            self._on_group(group.name)
            matrix = self._read(group)
            values = list(self._map(lambda member: excess_kurtosis(matrix(member)), range(group.count)))
            bad = next((i for i, value in enumerate(values) if value != value), None)
            if bad is not None:
                raise WeightError(f"{group.name} (member {bad}) holds NaN or Inf; the source checkpoint is damaged")
            self._known[group.name] = values
        return self._known[group.name]
