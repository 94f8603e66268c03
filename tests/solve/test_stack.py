"""`solve_stack`, the solver's front door: what it stores is what it reports, for every kind of matrix."""

from __future__ import annotations

import math

import pytest
import torch

from milo.errors import PlanError, WeightError
from milo.format.matrix import BITS, FACTOR_BITS, Encoding
from milo.kernels import reference
from milo.kernels.reference import reconstruct
from milo.solve.grid import Grid, encode
from milo.solve.stack import Solved, buckets, solve_stack


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def true_error(weight: torch.Tensor, solved: Solved, encoding: Encoding) -> float:
    """The error that a loader sees, recomputed from the stored tensors in float64."""
    n, k = weight.shape
    rebuilt = reconstruct(solved.tensors, encoding, (n, k)).double()
    return ((weight.double() - rebuilt).norm() / weight.double().norm()).item()


@pytest.mark.parametrize("grid", ["rtn", "hqq", "mse"])
@pytest.mark.parametrize(
    "encoding",
    [
        *(Encoding(bits) for bits in BITS),
        *(Encoding(factor=factor) for factor in FACTOR_BITS),
        Encoding(3, 32, scale_bits=8, zero_bits=8),
        Encoding(4, 128, scale_bits=6, zero_bits=6, factor="int8"),
    ],
    ids=str,
)
def test_the_reported_error_is_that_of_the_stored_tensors(encoding: Encoding, grid: str) -> None:
    weight = normal(4, 72, 96)
    results = solve_stack(weight, [0, 1, 17, 72], encoding, grid, rounds=3)
    for matrix, solved in zip(weight, results, strict=True):
        assert solved.error == pytest.approx(true_error(matrix, solved, encoding), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("factor", ["int3", "fp16"])
def test_codes_are_the_nearest_to_what_the_stored_compensator_leaves(factor: str) -> None:
    weight, encoding = normal(1, 72, 96), Encoding(factor=factor)
    tensors = solve_stack(weight, [17], encoding, rounds=3)[0].tensors
    u, v = reference.factor(tensors, encoding, "lowrank_u", 72), reference.factor(tensors, encoding, "lowrank_v", 96)
    assert u is not None
    assert v is not None
    grid = Grid(reference.scales(tensors, encoding, 2)[None], reference.zeros(tensors, encoding, 2)[None])
    nearest = encode(weight - u.T @ v, grid, encoding)[0]
    assert (nearest == reference.codes(tensors, encoding, 96)).double().mean() > 0.999


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("full", [24, 96, 300])
def test_full_rank_and_rank_0_are_solved_apart_on_any_device(device_type: str, full: int) -> None:
    """A matrix of full rank needs no fit, so none of lower rank may share its bucket, however narrow both are."""
    ranks = [full, 0, 3, full - 1, 0, full, 6]
    found = buckets(ranks, full, device_type)
    assert found[0] == [1, 4]
    assert found[-1] == [0, 5]
    assert sorted(member for members in found for member in members) == list(range(len(ranks)))
    tops = [max(ranks[member] for member in members) for members in found]
    assert tops == sorted(tops)


def test_a_gpu_tells_ranks_apart_from_128_on() -> None:
    ranks = [1, 127, 2, 128, 60, 300]
    assert buckets(ranks, 512, "cuda") == [[0, 1, 2, 4], [3], [5]]
    assert buckets(ranks, 512, "cpu") == [[0], [2], [4], [1], [3], [5]]


def test_more_rank_and_more_bits_mean_less_error() -> None:
    weight = normal(5, 96, 128)
    errors = [s.error for s in solve_stack(weight, [0, 4, 16, 48, 96], Encoding(), rounds=6)]
    assert errors == sorted(errors, reverse=True)
    by_bits = [solve_stack(weight[:1], [8], Encoding(bits), rounds=3)[0].error for bits in BITS]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] < 0.01 < by_bits[0] < 0.5


def test_without_compensators_a_stack_is_solved_bit_for_bit_as_its_members_are() -> None:
    weight = normal(3, 40, 200)
    together = solve_stack(weight, [0, 0, 0], Encoding())
    for i, solved in enumerate(together):
        alone = solve_stack(weight[i : i + 1], [0], Encoding())[0]
        assert alone.error == solved.error
        assert all(torch.equal(alone.tensors[k], t) for k, t in solved.tensors.items())


def test_with_compensators_a_stack_is_solved_as_its_members_are() -> None:
    """Not bit for bit: ranks 8 and 9 share a bucket and a basis, and batched products sum in another order."""
    weight = normal(6, 96, 128)
    ranks = [8, 0, 9, 3, 40, 8]
    together = solve_stack(weight, ranks, Encoding(), rounds=5)
    for i, solved in enumerate(together):
        alone = solve_stack(weight[i : i + 1], [ranks[i]], Encoding(), rounds=5)[0]
        assert solved.tensors.keys() == alone.tensors.keys()
        assert all(solved.tensors[k].shape == t.shape for k, t in alone.tensors.items())
        assert solved.error == pytest.approx(alone.error, rel=1e-2)


def test_two_runs_give_the_same_bits_whatever_the_global_generator_says() -> None:
    weight = normal(4, 64, 96)
    torch.manual_seed(1)
    first = solve_stack(weight, [3, 0, 8, 20], Encoding(), rounds=6)
    torch.manual_seed(2)
    second = solve_stack(weight, [3, 0, 8, 20], Encoding(), rounds=6)
    for a, b in zip(first, second, strict=True):
        assert (a.error, a.error_unrounded, a.rounds) == (b.error, b.error_unrounded, b.rounds)
        assert all(torch.equal(a.tensors[k], t) for k, t in b.tensors.items())


def test_the_input_is_not_changed() -> None:
    weight = normal(2, 64, 96)
    before = weight.clone()
    solve_stack(weight, [4, 0], Encoding(), rounds=3)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_is_solved_as_its_float32_copy(dtype: torch.dtype) -> None:
    weight = normal(1, 64, 96).to(dtype)
    a = solve_stack(weight, [4], Encoding(), rounds=2)[0]
    b = solve_stack(weight.float(), [4], Encoding(), rounds=2)[0]
    assert all(torch.equal(a.tensors[k], t) for k, t in b.tensors.items())


@pytest.mark.parametrize("shape", [(32, 32), (33, 32), (32, 33), (40, 40), (33, 200), (200, 33)])
@pytest.mark.parametrize("rank", [0, 5, 32])
def test_small_and_ragged_shapes(shape: tuple[int, int], rank: int) -> None:
    weight = normal(2, *shape)
    for matrix, solved in zip(weight, solve_stack(weight, [rank, rank], Encoding(), rounds=3), strict=True):
        assert solved.error == pytest.approx(true_error(matrix, solved, Encoding()), rel=1e-3, abs=1e-6)
        assert solved.error < 0.2


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_magnitude_of_the_weights_hardly_matters(scale: float, rank: int) -> None:
    weight = normal(1, 64, 128).clamp(-0.15, 0.15) * 20  # within ±3
    reference = solve_stack(weight, [rank], Encoding(), rounds=3)[0].error
    solved = solve_stack(weight * scale, [rank], Encoding(), rounds=3)[0]
    assert all(torch.isfinite(t.float()).all() for t in solved.tensors.values())
    assert solved.error == pytest.approx(true_error((weight * scale)[0], solved, Encoding()), rel=1e-3)
    assert solved.error < 1.15 * reference


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("scale_bits", [16, 8])
def test_a_zero_matrix_is_exact_and_its_error_is_zero(rank: int, scale_bits: int) -> None:
    encoding = Encoding(scale_bits=scale_bits)
    solved = solve_stack(torch.zeros(2, 40, 70), [rank, rank], encoding, rounds=5)
    for one in solved:
        assert (one.error, one.error_unrounded) == (0, 0)
        assert torch.equal(reconstruct(one.tensors, encoding, (40, 70)), torch.zeros(40, 70))


@pytest.mark.parametrize("rank", [0, 4])
def test_all_equal_groups_and_constant_rows_are_nearly_exact(rank: int) -> None:
    rows = normal(64, 1).expand(64, 128).clone()
    groups = normal(64, 2, seed=1).repeat_interleave(64, dim=1)
    one_value = torch.full((64, 128), -0.3)
    weight = torch.stack([rows, groups, one_value])
    for matrix, solved in zip(weight, solve_stack(weight, [rank] * 3, Encoding(), rounds=3), strict=True):
        assert solved.error == pytest.approx(true_error(matrix, solved, Encoding()), rel=1e-2, abs=1e-6)
        assert solved.error < 1e-3


def test_an_outlier_costs_its_own_group_only() -> None:
    weight = normal(1, 64, 128)
    spoiled = weight.clone()
    spoiled[0, 5, 3] = 40.0
    clean, bad = (solve_stack(w, [0], Encoding())[0].tensors for w in (weight, spoiled))
    a, b = (reconstruct(t, Encoding(), (64, 128)) for t in (clean, bad))
    same = torch.ones(64, 128, dtype=torch.bool)
    same[5, :64] = False
    # The shared stop rule may take HQQ a step further or less, so zeros may move a little.
    torch.testing.assert_close(a[same], b[same], rtol=0, atol=0.05)
    assert abs(b[5, 3] - 40) < 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused_naming_tensor_and_member(value: float) -> None:
    weight = normal(3, 40, 64)
    weight[1, 7, 9] = value
    with pytest.raises(WeightError, match=r"^layers\.0\.up \(member 1 of 3\) holds NaN or Inf"):
        solve_stack(weight, [0, 0, 0], Encoding(), name="layers.0.up")
    with pytest.raises(WeightError, match=r"^layers\.0\.up holds NaN or Inf"):
        solve_stack(weight[1:2], [4], Encoding(), name="layers.0.up")


def test_magnitudes_beyond_fp16_are_refused() -> None:
    weight = normal(2, 40, 64)
    weight[1, 0, 0] = -70000
    with pytest.raises(WeightError, match=r"^w holds 7e\+04, beyond what fp16 scales can express \(65504\)"):
        solve_stack(weight, [0, 0], Encoding(), name="w")


@pytest.mark.parametrize("ranks", [[41, 0], [0], [0, 0, 0], [-1, 0]])
def test_ranks_that_do_not_fit_are_refused(ranks: list[int]) -> None:
    with pytest.raises(PlanError, match=r"^w: ranks .* do not fit a stack of shape \(2, 40, 64\)"):
        solve_stack(normal(2, 40, 64), ranks, Encoding(), name="w")


def test_an_unknown_grid_is_refused_with_the_choices() -> None:
    with pytest.raises(PlanError, match="unknown grid 'awq'; choose one of rtn, hqq"):
        solve_stack(normal(1, 40, 64), [0], Encoding(), grid="awq")


def test_rank_zero_takes_one_round_and_the_others_as_many_as_they_need() -> None:
    solved = solve_stack(normal(2, 64, 96), [0, 4], Encoding(), rounds=5)
    assert [s.rounds for s in solved] == [1, 5]
