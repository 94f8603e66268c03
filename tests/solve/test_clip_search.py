"""The grid of least squared error against brute force, and against the grids it must not lose to."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milo.format.matrix import Encoding
from milo.kernels.reference import dequantize
from milo.solve.clip_search import mse_grid
from milo.solve.grid import Grid, decode, encode, grid_tensors, minmax_grid, to_groups
from milo.solve.half_quadratic import half_quadratic
from milo.solve.stack import _code_tensors, solve_stack


def draws(*shape: int, seed: int = 0, heavy: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    return weight * (1 + weight.abs() * 20) if heavy else weight


def group_errors(weight: torch.Tensor, grid: Grid, encoding: Encoding) -> torch.Tensor:
    """Squared error of each group as it is stored, `[E, N, G]`."""
    error = decode(encode(weight, grid, encoding), grid, encoding) - weight
    tail = -weight.shape[-1] % encoding.group_size
    padded = torch.nn.functional.pad(error, (0, tail))
    return to_groups(padded, encoding.group_size).double().square().sum(-1)


def least_error(values: torch.Tensor, bits: int) -> float:
    """The smallest squared error of any uniform grid on a few values: every assignment of codes is tried."""
    codes = torch.tensor(list(product(range(2**bits), repeat=len(values))), dtype=torch.float64)
    x = values.double() - values.double().mean()
    centred = codes - codes.mean(-1, keepdim=True)
    variance, covariance = centred.square().sum(-1), centred @ x
    explained = torch.where((variance > 0) & (covariance > 0), covariance.square() / variance.clamp(min=1e-9), 0)
    return (x.square().sum() - explained.max()).item()


@pytest.mark.parametrize("members", [6, 7])
def test_tiny_groups_nearly_reach_the_best_of_all_assignments(members: int) -> None:
    bits = 2
    weight = draws(1, 32, members, seed=3)
    encoding = Encoding(bits, 32)
    best = torch.tensor([least_error(row, bits) for row in weight[0]])
    found = group_errors(weight, mse_grid(weight, encoding, unbiased=False), encoding)[0, :, 0]
    total = weight.double().square().sum(-1)[0]
    assert (found >= best - 1e-3 * total).all()  # nobody beats it, but for fp16
    plain = group_errors(weight, minmax_grid(weight, encoding), encoding)[0, :, 0]
    assert found.sum() < 1.15 * best.sum()
    assert (found < 1.01 * best).float().mean() > 0.75
    assert plain.sum() > 1.5 * best.sum()  # it is not easy


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("size", "scale_bits", "zero_bits"), [(64, 16, 16), (32, 6, 6), (64, 6, 8), (128, 8, 6)])
def test_never_worse_than_the_other_grids(bits: int, size: int, scale_bits: int, zero_bits: int, heavy: bool) -> None:
    encoding = Encoding(bits, size, scale_bits, zero_bits)
    weight = draws(2, 48, 300, seed=bits, heavy=heavy)
    ours = group_errors(weight, mse_grid(weight, encoding), encoding)
    plain = group_errors(weight, minmax_grid(weight, encoding), encoding)
    hqq = group_errors(weight, half_quadratic(weight, minmax_grid(weight, encoding), encoding), encoding)
    slack = 1 + 1e-5  # the search measures in float32
    if scale_bits == 16:
        assert (ours <= plain * slack).all()
    assert (ours.sum(-1) <= plain.sum(-1) * slack).all()
    assert (ours.sum((1, 2)) < hqq.sum((1, 2))).all()


def test_clipping_pays_at_three_bits() -> None:
    """The reason for the search: a sixth off HQQ's squared error at the same bytes."""
    weight, encoding = draws(1, 256, 512, seed=1), Encoding()
    hqq = half_quadratic(weight, minmax_grid(weight, encoding), encoding)
    ours = group_errors(weight, mse_grid(weight, encoding), encoding).sum()
    assert ours < 0.83 * group_errors(weight, hqq, encoding).sum()


def lengths(weight: torch.Tensor, grid: Grid, encoding: Encoding) -> torch.Tensor:
    """`⟨ŵ, w⟩ / ‖w‖²` of every row."""
    stored = decode(encode(weight, grid, encoding), grid, encoding)
    return (stored * weight).sum(-1) / weight.square().sum(-1)


@pytest.mark.parametrize("scale_bits", [16, 6])
@pytest.mark.parametrize("bits", [3, 4])
def test_rows_are_scaled_back_to_their_length(bits: int, scale_bits: int) -> None:
    encoding = Encoding(bits, 64, scale_bits, 6)
    weight = draws(2, 64, 300, seed=bits)
    shrunk, unbiased = mse_grid(weight, encoding, unbiased=False), mse_grid(weight, encoding)
    relative = (group_errors(weight, shrunk, encoding).sum() / weight.double().square().sum()).item()
    before, after = (1 - lengths(weight, grid, encoding).mean().item() for grid in (shrunk, unbiased))
    assert before == pytest.approx(relative, rel=0.15)  # a conditional mean is as much shorter as its error is large
    assert abs(after) < 0.6 * before  # codes are chosen anew afterwards, so that not all of it comes back
    grown = group_errors(weight, unbiased, encoding).sum() / group_errors(weight, shrunk, encoding).sum()
    assert grown < 1 + 1.5 * relative


@pytest.mark.parametrize(("scale_bits", "columns"), [(16, 256), (6, 300)])
def test_important_columns_get_the_better_grid(scale_bits: int, columns: int) -> None:
    encoding = Encoding(3, 64, scale_bits, 6)
    weight = draws(2, 64, columns, seed=2)
    importance = torch.exp(torch.randn(2, columns, generator=torch.Generator().manual_seed(3)))
    plain, ours = mse_grid(weight, encoding), mse_grid(weight, encoding, importance)

    def loss(grid: Grid) -> torch.Tensor:
        error = decode(encode(weight, grid, encoding), grid, encoding) - weight
        return (error.square() * importance[:, None]).sum()

    assert loss(ours) < 0.96 * loss(plain)
    assert group_errors(weight, ours, encoding).sum() > group_errors(weight, plain, encoding).sum()
    alike = mse_grid(weight, encoding, torch.full((2, columns), 3.0))
    torch.testing.assert_close(alike.scale, plain.scale, rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    offset=st.sampled_from([0.0, 0.3, -40.0]),
    spread=st.sampled_from([0.0, 1e-6, 0.05, 300.0]),
    bits=st.sampled_from([2, 3, 4, 8]),
    meta=st.sampled_from([(16, 16), (6, 6), (6, 8), (8, 16), (16, 6)]),
    seed=st.integers(0, 3),
)
def test_whatever_the_weights_what_is_stored_is_the_grid_and_no_row_loses_to_rounding(
    rows: int, columns: int, offset: float, spread: float, bits: int, meta: tuple[int, int], seed: int
) -> None:
    encoding = Encoding(bits, 32, *meta)
    weight = offset + spread * draws(1, rows, columns, seed=seed) * 20
    weight[0, 0, : columns // 2] = 0
    grid = mse_grid(weight, encoding)
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale > 0).all()
    codes = encode(weight, grid, encoding)
    tensors = grid_tensors(grid, encoding) | _code_tensors(codes, encoding)
    rebuilt = dequantize(tensors, encoding, columns)
    magnitude = weight.abs().max().item()
    torch.testing.assert_close(rebuilt, decode(codes, grid, encoding), rtol=1e-4, atol=2e-6 * magnitude + 1e-12)
    ours = group_errors(weight, grid, encoding).sum(-1)
    plain = group_errors(weight, minmax_grid(weight, encoding), encoding).sum(-1)
    assert (ours <= plain * (1 + 1e-4) + columns * (1e-6 * magnitude) ** 2).all()


def test_a_group_of_zeros_does_not_coarsen_the_row_it_shares_a_super_scale_with() -> None:
    weight = draws(1, 8, 128)
    weight[..., :32] = 0
    encoding = Encoding(4, 32, 6, 6)
    for search in (minmax_grid, mse_grid):
        error = group_errors(weight, search(weight, encoding), encoding)
        assert error[..., 0].max() == 0
        assert error.sum() < 0.02 * weight.square().sum()


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, encoding = draws(3, 50, 96), Encoding(3, 32, 6, 6)
    whole = mse_grid(weight, encoding)
    monkeypatch.setattr("milo.solve.clip_search._CPU_BLOCK", 96 * 7)
    parts = mse_grid(weight, encoding)
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.zero, whole.zero, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 8])
def test_it_works_inside_the_alternation(rank: int) -> None:
    weight = draws(1, 96, 128, seed=5) + draws(1, 96, 4, seed=6) @ draws(1, 4, 128, seed=7) * 100
    encoding = Encoding(3, 32, 6, 6)
    errors = {grid: solve_stack(weight, [rank], encoding, grid, rounds=6)[0].error for grid in ("hqq", "mse")}
    assert errors["mse"] < errors["hqq"]
