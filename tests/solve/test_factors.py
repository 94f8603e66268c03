"""Rounding the compensator's factors, against the official signed-max rule and the obvious abs-max cure.

The official rule cuts U [m, r] and V [r, n] row-major into 64s, takes the *signed* maximum of each as its
scale and stores `clamp(round(7x / 2s) + 4, 0, 7)`, worth `(q − 4) · 2s / 7`: a group whose largest magnitude is
negative is clipped. Taking the absolute maximum is no cure; ours must add less error than either.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from milo.checkpoint.source import Checkpoint
from milo.format.codes import unpack_words
from milo.format.matrix import FACTOR_GROUP, Encoding
from milo.solve.alternate import alternate
from milo.solve.factors import round_factors, round_rows, value_of
from milo.solve.grid import decode, minmax_grid
from milo.solve.half_quadratic import half_quadratic


def official(matrix: torch.Tensor, signed: bool = True) -> torch.Tensor:
    """The official INT3 rule (`signed`), or the same with the absolute maximum."""
    groups = matrix.reshape(-1, 64)
    scale = (groups if signed else groups.abs()).amax(1, keepdim=True)
    codes = torch.clamp(torch.round(7 * groups / (2 * scale)) + 4, 0, 7)
    return ((codes - 4) * 2 * scale / 7).reshape(matrix.shape)


def compensated(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual, U and V of three rounds of the alternation."""
    encoding = Encoding()

    def search(target: torch.Tensor, e: Encoding):
        return half_quadratic(target, minmax_grid(target, e), e)

    best = alternate(weight[None], [rank], search, encoding, 3)
    u, v = best.fit.factors()
    return weight - decode(best.codes, best.grid, encoding)[0], u[0], v[0]


def check_added_error(weight: torch.Tensor, rank: int) -> None:
    residual, u, v = compensated(weight, rank)
    exact = (residual - u @ v).norm()

    def added(product: torch.Tensor) -> float:
        return ((residual - product).norm() - exact).item()

    ours = added(round_factors(residual, u, v, "int3")[1])
    signed_max = added(official(u) @ official(v))
    abs_max = added(official(u, signed=False) @ official(v, signed=False))
    assert 0 <= ours < signed_max
    assert ours < abs_max
    int8 = added(round_factors(residual, u, v, "int8")[1])
    fp16 = added(round_factors(residual, u, v, "fp16")[1])
    assert fp16 <= int8 + 1e-6 * exact.item()
    assert int8 < 0.02 * ours + 1e-6 * exact.item()


@pytest.mark.parametrize(("rank", "seed"), [(8, 0), (64, 1)])
def test_int3_adds_less_error_than_either_maximum_on_random_weights(rank: int, seed: int) -> None:
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(seed)) * 0.05
    check_added_error(weight, rank)


@pytest.mark.parametrize(
    ("name", "rank"),
    [("model.layers.1.self_attn.o_proj", 64), ("model.layers.2.block_sparse_moe.experts.1.w1", 16)],
)
def test_int3_adds_less_error_than_either_maximum_on_trained_weights(
    name: str, rank: int, trained_mixtral: Path
) -> None:
    check_added_error(Checkpoint(trained_mixtral).read(f"{name}.weight").float(), rank)


def test_a_group_whose_largest_magnitude_is_negative_is_not_clipped() -> None:
    """The defect of the signed maximum, isolated: one long negative arm."""
    row = torch.full((1, 64), 0.1)
    row[0, :8] = -1.0
    assert (official(row) - row).norm() > 2
    codes, scales = round_rows(row, 3)
    assert (value_of(codes, scales, 3) - row).norm() < 0.8
    assert scales.item() > 0  # the sign puts the longer arm, four levels, below zero
    assert round_rows(-row, 3)[1].item() < 0


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_codes_and_scales_have_the_shapes_of_the_format_and_values_come_back(bits: int, length: int) -> None:
    rows = torch.randn(5, length, generator=torch.Generator().manual_seed(length))
    codes, scales = round_rows(rows, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == rows.shape
    assert int(codes.max()) < 2**bits
    assert scales.dtype == torch.float16
    assert scales.shape == (5, -(-length // FACTOR_GROUP))
    # A lone value hits a level exactly; long rows are as good as the number of levels allows.
    bound = 0.35 if bits == 3 else 0.012
    assert (value_of(codes, scales, bits) - rows).norm() < bound * rows.norm()


def test_rounding_is_better_than_abs_max_on_every_row_of_noise() -> None:
    rows = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    ours = (value_of(*round_rows(rows, 3), 3) - rows).square().sum(1)
    theirs = (official(rows, signed=False) - rows).square().sum(1)
    assert (ours < theirs).all()


def test_zero_rows_stay_zero() -> None:
    codes, scales = round_rows(torch.zeros(2, 70), 3)
    assert torch.equal(value_of(codes, scales, 3), torch.zeros(2, 70))
    tensors, product = round_factors(torch.ones(40, 50), torch.zeros(40, 3), torch.zeros(3, 50), "int3")
    assert torch.equal(product, torch.zeros(40, 50))
    assert all(torch.isfinite(t.float()).all() for t in tensors.values())


@pytest.mark.parametrize("kind", ["int3", "int8", "fp16"])
def test_the_product_is_that_of_the_stored_tensors(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    u, v = torch.randn(70, 9, generator=generator), torch.randn(9, 100, generator=generator)
    tensors, product = round_factors(u @ v, u, v, kind)
    if kind == "fp16":
        stored = [tensors["lowrank_u"].float(), tensors["lowrank_v"].float()]
    else:
        bits = int(kind[3:])
        stored = [
            value_of(unpack_words(tensors[f"lowrank_{n}"], bits, length), tensors[f"lowrank_{n}_scale"], bits)
            for n, length in (("u", 70), ("v", 100))
        ]
    torch.testing.assert_close(product, stored[0].T @ stored[1])


def test_factors_that_say_the_same_thing_many_times_stay_finite() -> None:
    """Equal columns of U make the refit's normal equations singular."""
    u = torch.ones(520, 1).expand(520, 512)
    v = torch.randn(512, 530, generator=torch.Generator().manual_seed(7)) * 0.01 + 0.1
    product = round_factors(u @ v, u, v, "int3")[1]
    assert torch.isfinite(product).all()
    assert (product - u @ v).norm() < 0.5 * (u @ v).norm()


def test_v_takes_up_what_rounding_u_leaves() -> None:
    """The refit: rounding U and V apart from each other leaves more."""
    generator = torch.Generator().manual_seed(6)
    u, v = torch.randn(256, 8, generator=generator), torch.randn(8, 192, generator=generator)
    residual = u @ v + torch.randn(256, 192, generator=generator)
    apart = value_of(*round_rows(u.mT.contiguous(), 3), 3).mT @ value_of(*round_rows(v, 3), 3)
    together = round_factors(residual, u, v, "int3")[1]
    assert (residual - together).norm() < (residual - apart).norm()
