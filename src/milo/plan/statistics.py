"""Statistics of weights that rank policies look at: the excess kurtosis of each matrix.

`κ = mean((w − μ)⁴) / σ⁴ − 3`, with σ the sample standard deviation as in the official code (`torch.std`). Taken in
float32 over the whole matrix, one matrix at a time, so that memory is bounded by one group as it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from milo.checkpoint.inventory import Group
from milo.errors import WeightError

Reader = Callable[[Group], Iterable[torch.Tensor]]


def excess_kurtosis(weight: torch.Tensor) -> float:
    """Excess kurtosis of all elements of `weight`; 0 for a constant matrix."""
    flat = weight.float().flatten()
    centred = flat - flat.mean(dtype=torch.float64).float()  # so that a constant matrix has no variance
    variance = centred.square().sum(dtype=torch.float64) / (flat.numel() - 1)
    if variance == 0:
        return 0.0
    fourth = centred.square_().square_().mean(dtype=torch.float64)
    return (fourth / variance.square() - 3).item()


class WeightStatistics:
    """Kurtosis of groups, each read once.

    Args:
        read: yields the matrices `[N, K]` of a group in order.
        on_group: called with each group's name before it is read (progress).
    """

    def __init__(self, read: Reader, on_group: Callable[[str], None] = lambda name: None) -> None:
        self._read = read
        self._on_group = on_group
        self._known: dict[str, list[float]] = {}

    def kurtosis(self, group: Group) -> list[float]:
        """Excess kurtosis of each member.

        Raises:
            WeightError: NaN or Inf in a matrix.
        """
        if group.name not in self._known:
            self._on_group(group.name)
            values = [excess_kurtosis(matrix) for matrix in self._read(group)]
            bad = next((i for i, value in enumerate(values) if value != value), None)
            if bad is not None:
                raise WeightError(f"{group.name} (member {bad}) holds NaN or Inf; the source checkpoint is damaged")
            self._known[group.name] = values
        return self._known[group.name]
