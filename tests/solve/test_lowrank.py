"""The low-rank fit against the exact SVD: energy captured cold and warm, exactness near full rank."""

from __future__ import annotations

import pytest
import torch

from milo.format.matrix import Encoding
from milo.solve.grid import decode, encode, minmax_grid
from milo.solve.lowrank import fit_lowrank

SHAPES = [(256, 192), (192, 256)]


def residual(shape: tuple[int, int], stack: int = 3, seed: int = 0) -> torch.Tensor:
    """What a 3-bit grid leaves of random weights: nearly white, the hardest spectrum for an iteration."""
    weight = torch.randn(stack, *shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    encoding = Encoding()
    grid = minmax_grid(weight, encoding)
    return weight - decode(encode(weight, grid, encoding), grid, encoding)


def best_energy(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svdvals(matrix)[:, :rank].square().sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "least"), [(1, 0.95), (4, 0.96), (16, 0.98), (64, 0.99)])
def test_a_cold_fit_captures_almost_the_energy_of_the_exact_one(
    rank: int, least: float, shape: tuple[int, int]
) -> None:
    matrix = residual(shape)
    fit = fit_lowrank(matrix, rank)
    share = fit.energy.sum(-1) / best_energy(matrix, rank)
    assert (share > least).all()
    assert (share < 1 + 1e-4).all()


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_a_warm_fit_of_a_similar_residual_needs_one_pass_to_be_as_good(rank: int) -> None:
    matrix = residual((256, 192))
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9)) * 0.1 * matrix.std()
    cold = fit_lowrank(matrix, rank)
    warm = fit_lowrank(matrix + noise, rank, cold.basis)
    best = best_energy(matrix + noise, rank)
    assert (warm.energy.sum(-1) > 0.97 * best).all()
    # One pass from nowhere is worse: the basis is what carries it.
    nowhere = torch.randn(cold.basis.shape, generator=torch.Generator().manual_seed(1))
    assert (warm.energy.sum(-1) > fit_lowrank(matrix + noise, rank, nowhere).energy.sum(-1)).all()


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (33, 40)])
@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_from_half_the_full_rank_on_the_fit_is_exact(shape: tuple[int, int], share: float) -> None:
    matrix = residual(shape)
    rank = round(share * min(shape))
    fit = fit_lowrank(matrix, rank)
    left = (matrix - fit.u @ fit.v).square().sum((1, 2))
    expected = torch.linalg.svdvals(matrix)[:, rank:].square().sum(-1)
    torch.testing.assert_close(left, expected, rtol=1e-3, atol=1e-5 * matrix.square().sum().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_leaves_nothing(shape: tuple[int, int]) -> None:
    matrix = residual(shape)
    fit = fit_lowrank(matrix, min(shape))
    assert (matrix - fit.u @ fit.v).norm() < 2e-3 * matrix.norm()


@pytest.mark.parametrize("rank", [1, 16, 96, 192])
def test_the_energy_is_what_the_product_removes_and_singular_values_are_split_evenly(rank: int) -> None:
    """The alternation computes its error from `energy`, without forming the product."""
    matrix = residual((256, 192))
    fit = fit_lowrank(matrix, rank)
    left = (matrix - fit.u @ fit.v).square().sum((1, 2))
    torch.testing.assert_close(matrix.square().sum((1, 2)) - fit.energy.sum(-1), left, rtol=1e-3, atol=1e-4)
    assert (fit.energy.diff(dim=-1) <= 0).all()
    sigma = fit.energy.sqrt()
    torch.testing.assert_close(fit.u.square().sum(1), sigma, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(fit.v.square().sum(2), sigma, rtol=1e-2, atol=1e-4)


def test_a_low_rank_matrix_is_recovered() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(2, 200, 5, generator=generator) @ torch.randn(2, 5, 150, generator=generator)
    fit = fit_lowrank(matrix, 5)
    torch.testing.assert_close(fit.u @ fit.v, matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [3, 40])
def test_a_zero_matrix_gives_zero_factors(rank: int) -> None:
    fit = fit_lowrank(torch.zeros(2, 96, 64), rank)
    assert torch.equal(fit.u @ fit.v, torch.zeros(2, 96, 64))
    assert torch.equal(fit.energy, torch.zeros(2, rank))


@pytest.mark.parametrize("rank", [4, 64])
def test_the_fit_is_deterministic_and_leaves_the_global_generator_alone(rank: int) -> None:
    matrix = residual((128, 128))
    torch.manual_seed(1)
    first = fit_lowrank(matrix, rank)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    second = fit_lowrank(matrix, rank)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_a_rank_beyond_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is out of range for matrices of 40 x 50"):
        fit_lowrank(torch.zeros(1, 40, 50), rank)
