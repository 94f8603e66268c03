"""Excess kurtosis as the official code computes it, read once a group, refusing damaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from milo.checkpoint.inventory import Group, Kind
from milo.checkpoint.roles import Role
from milo.errors import WeightError
from milo.plan import statistics
from milo.plan.statistics import WeightStatistics, excess_kurtosis

GROUP = Group("l.experts.*.up", Role.EXPERT, Kind.EXPERTS, ("a", "b"), 2, (64, 64), "F32")


def official(weight: torch.Tensor) -> float:
    w = weight.double()
    return (((w - w.mean()) ** 4).mean() / w.std() ** 4 - 3).item()


@pytest.mark.parametrize("tail", [0.0, 2.0, 20.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_it_is_the_official_formula(tail: float, scale: float) -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    weight[::50, ::50] *= 1 + tail
    assert excess_kurtosis(weight * scale) == pytest.approx(official(weight), rel=1e-3, abs=1e-3)
    assert abs(excess_kurtosis(weight)) < 0.1 or tail > 0


def test_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    assert excess_kurtosis(torch.rand(500, 500, generator=generator)) == pytest.approx(-1.2, abs=0.02)
    assert excess_kurtosis(torch.tensor([-1.0, 1.0] * 500)) == pytest.approx(-2, abs=0.01)
    assert excess_kurtosis(torch.full((8, 8), 0.3)) == 0


def test_bfloat16_weights_are_not_summed_in_bfloat16() -> None:
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert excess_kurtosis(weight) == pytest.approx(official(weight), abs=1e-3)


def test_a_group_is_read_once_and_progress_names_it() -> None:
    reads, seen = [], []

    def read(group: Group) -> Callable[[int], torch.Tensor]:
        reads.append(group.name)
        return lambda member: torch.randn(64, 64, generator=torch.Generator().manual_seed(member))

    found = WeightStatistics(read, seen.append)
    first = found.kurtosis(GROUP)
    assert found.kurtosis(GROUP) == first
    assert len(first) == 2
    assert first[0] != first[1]
    assert reads == seen == [GROUP.name]


def test_members_in_parallel_give_the_same_in_the_same_order() -> None:
    many = Group("l.experts.*.up", Role.EXPERT, Kind.EXPERTS, tuple("abcdefghij"), 10, (64, 64), "F32")
    matrices = [torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    alone = WeightStatistics(lambda group: matrices.__getitem__).kurtosis(many)
    with ThreadPoolExecutor(3) as pool:
        found = WeightStatistics(lambda group: matrices.__getitem__, mapper=pool.map).kurtosis(many)
    assert found == pytest.approx(alone, abs=1e-12)  # a sum's last bit depends on how many threads PyTorch takes for it
    assert alone == [excess_kurtosis(matrix) for matrix in matrices]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_constant_matrix_of_many_chunks_has_exactly_none(dtype: torch.dtype) -> None:
    for value in (0.1, -3e-3, 7.7):
        assert excess_kurtosis(torch.full((701, 1009), value, dtype=dtype)) == 0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a last one that is short, nor levels that differ from chunk to chunk, nor a transposed matrix."""
    weight = torch.randn(300, 700, generator=torch.Generator().manual_seed(2)) + torch.arange(300)[:, None] / 100
    assert excess_kurtosis(weight) == pytest.approx(official(weight), rel=1e-9)
    assert excess_kurtosis(weight.mT) == pytest.approx(official(weight), rel=1e-9)
    monkeypatch.setattr(statistics, "_CPU_CHUNK", 1 << 20)
    assert excess_kurtosis(weight) == pytest.approx(official(weight), rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_name_the_group_and_the_member(value: float) -> None:
    bad = torch.randn(64, 64)
    bad[3, 3] = value
    found = WeightStatistics(lambda group: [torch.randn(64, 64), bad].__getitem__)
    with pytest.raises(WeightError, match=r"^l\.experts\.\*\.up \(member 1\) holds NaN or Inf"):
        found.kurtosis(GROUP)
