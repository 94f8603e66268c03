"""The low-rank fit against the exact SVD: energy captured cold and warm, hard spectra, members of different ranks."""

from __future__ import annotations

import pytest
import torch

from milo.format.matrix import Encoding
from milo.solve.grid import decode, encode, minmax_grid
from milo.solve.lowrank import LowRank, fit_lowrank, whole

SHAPES = [(256, 192), (192, 256)]


def residual(shape: tuple[int, int], stack: int = 3, seed: int = 0) -> torch.Tensor:
    """What a 3-bit grid leaves of random weights: nearly white, the hardest spectrum for an iteration."""
    weight = torch.randn(stack, *shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    encoding = Encoding()
    grid = minmax_grid(weight, encoding)
    return weight - decode(encode(weight, grid, encoding), grid, encoding)


def fit(matrix: torch.Tensor, rank: int, basis: torch.Tensor | None = None) -> LowRank:
    return fit_lowrank(matrix, torch.full((len(matrix),), rank), rank, basis)


def left_over(matrix: torch.Tensor, found: LowRank) -> torch.Tensor:
    return (matrix.double() - found.left.double() @ found.right.double()).square().sum((1, 2))


def best_energy(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())[:, :rank].square().sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("rank", "least"), [(1, 0.85), (4, 0.88), (16, 0.94), (64, 0.98), (96, 0.99), (150, 0.995), (192, 0.9999)]
)
def test_a_cold_fit_captures_almost_the_energy_of_the_exact_one(
    rank: int, least: float, shape: tuple[int, int]
) -> None:
    matrix = residual(shape)
    share = fit(matrix, rank).energy / best_energy(matrix, rank)
    assert (share > least).all()
    assert (share < 1 + 1e-4).all()


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_a_warm_fit_of_a_similar_residual_needs_one_pass_to_be_as_good(rank: int) -> None:
    matrix = residual((256, 192))
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9)) * 0.1 * matrix.std()
    cold = fit(matrix, rank)
    warm = fit(matrix + noise, rank, cold.basis)
    assert (warm.energy > 0.99 * cold.energy).all()
    # One pass from nowhere is worse: the basis is what carries it.
    nowhere = torch.randn(cold.basis.shape, generator=torch.Generator().manual_seed(1))
    assert (warm.energy > fit(matrix + noise, rank, nowhere).energy).all()


def test_the_iteration_converges_to_the_exact_svd() -> None:
    matrix, basis = residual((192, 256)), None
    for _ in range(40):
        found = fit(matrix, 16, basis)
        basis = found.basis
    assert (found.energy > 0.995 * best_energy(matrix, 16)).all()


@pytest.mark.parametrize("decades", [2, 4, 8])
@pytest.mark.parametrize("rank", [16, 100])
def test_ill_conditioned_spectra_lose_no_energy_and_keep_columns_orthonormal(decades: int, rank: int) -> None:
    """Singular values that fall geometrically, so that a basis is far worse conditioned than float32 can square."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(2, n, 128, generator=generator).double()).Q for n in (200, 160))
    sigma = torch.logspace(0, -decades, 128, dtype=torch.float64)
    matrix = ((left * sigma) @ right.mT).float()
    found = fit(matrix, rank)
    found = fit(matrix, rank, found.basis)
    gone = matrix.double().square().sum((1, 2)) - left_over(matrix, found)
    torch.testing.assert_close(gone, best_energy(matrix, rank), rtol=1e-2, atol=0)
    torch.testing.assert_close(found.energy, gone, rtol=1e-3, atol=0)
    singular = torch.linalg.svdvals(found.left.double())
    assert (singular < 1 + 1e-3).all()  # never longer: energy is not invented


@pytest.mark.parametrize("times", [1, 10, 30, 1000])
def test_a_few_directions_that_dwarf_the_rest_hide_nothing_that_counts(times: float) -> None:
    """Two directions above a white bulk: the bulk is fitted too, up to where it is lost in float32 beside them."""
    generator = torch.Generator().manual_seed(4)
    bulk = torch.randn(1, 200, 160, generator=generator)
    matrix = bulk + times * torch.randn(1, 200, 2, generator=generator) @ torch.randn(1, 2, 160, generator=generator)
    exact = torch.linalg.svdvals(matrix.double())[:, 34:].square().sum(-1)
    found = fit(matrix, 34)
    assert (left_over(matrix, found) < 1.05 * exact).all()
    for _ in range(10):
        found = fit(matrix, 34, found.basis)
    slack = 0.05 * exact if times <= 30 else 1e-6 * matrix.double().square().sum((1, 2))
    assert (left_over(matrix, found) < exact + slack).all()


def test_columns_are_orthonormal() -> None:
    left = fit(residual((256, 192)), 64).left
    torch.testing.assert_close(left.mT @ left, torch.eye(64).expand(3, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 16, 96, 192])
def test_the_energy_is_what_the_product_removes_and_factors_share_it_evenly(rank: int) -> None:
    """The alternation computes its error from `energy`, without forming the product."""
    matrix = residual((256, 192))
    found = fit(matrix, rank)
    total = matrix.double().square().sum((1, 2))
    torch.testing.assert_close(total - found.energy, left_over(matrix, found), rtol=1e-3, atol=1e-4)
    u, v = found.factors()
    torch.testing.assert_close(u @ v, found.left @ found.right, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(u.norm(dim=1), v.norm(dim=2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_member_of_lower_rank_is_fitted_as_if_alone(shape: tuple[int, int]) -> None:
    matrix = residual(shape, stack=1).expand(3, -1, -1)
    found = fit_lowrank(matrix, torch.tensor([3, 16, 9]), 16)
    for member, rank in enumerate([3, 16, 9]):
        assert not found.left[member, :, rank:].any()
        assert not found.right[member, rank:].any()
        assert not found.basis[member, :, rank:].any()
        alone = fit(matrix[:1], rank)
        assert found.energy[member] == pytest.approx(alone.energy.item(), rel=0.05)


@pytest.mark.parametrize("rank", [8, 64])
def test_bfloat16_residuals_lose_nothing_that_matters(rank: int) -> None:
    matrix = residual((256, 192))
    plain, coarse = fit(matrix, rank), fit(matrix.bfloat16(), rank)
    assert coarse.left.dtype == coarse.right.dtype == torch.float32
    assert (left_over(matrix, coarse) < 1.002 * left_over(matrix, plain)).all()
    torch.testing.assert_close(
        matrix.double().square().sum((1, 2)) - coarse.energy, left_over(matrix, coarse), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (40, 40)])
def test_the_trivial_factors_of_full_rank_are_exact(shape: tuple[int, int]) -> None:
    matrix = residual(shape)
    found = whole(matrix)
    assert torch.equal(found.left @ found.right, matrix)
    u, v = found.factors()
    assert u.shape[-1] == v.shape[1] == min(shape)
    torch.testing.assert_close(u @ v, matrix, rtol=1e-5, atol=1e-7)


def test_a_low_rank_matrix_is_recovered() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(2, 200, 5, generator=generator) @ torch.randn(2, 5, 150, generator=generator)
    for rank in (5, 30):
        found = fit(matrix, rank)
        torch.testing.assert_close(found.left @ found.right, matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [3, 40])
def test_a_zero_matrix_gives_zero_factors(rank: int) -> None:
    found = fit(torch.zeros(2, 96, 64), rank)
    u, v = found.factors()
    assert torch.equal(u @ v, torch.zeros(2, 96, 64))
    assert not found.energy.any()


@pytest.mark.parametrize("rank", [4, 64])
def test_the_fit_is_deterministic_and_leaves_the_global_generator_alone(rank: int) -> None:
    matrix = residual((128, 128))
    torch.manual_seed(1)
    first = fit(matrix, rank)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    second = fit(matrix, rank)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_a_rank_beyond_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is out of range for matrices of 40 x 50"):
        fit(torch.zeros(1, 40, 50), rank)
