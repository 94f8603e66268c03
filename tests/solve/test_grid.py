"""Grids: scales and zeros are chosen in the form in which they are stored, and storing changes nothing."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from milo.format.matrix import META_BITS, Encoding
from milo.kernels.reference import dequantize, scales, zeros
from milo.solve.grid import (
    decode,
    encode,
    grid_tensors,
    group_counts,
    minmax_grid,
    round_scale,
    round_zero,
    to_groups,
)
from milo.solve.half_quadratic import half_quadratic
from milo.solve.stack import _code_tensors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_the_ends_of_a_group_fall_on_the_first_and_last_code() -> None:
    weight = normal(2, 40, 128)
    codes = encode(weight, minmax_grid(weight, Encoding()), Encoding())
    groups = codes.unflatten(-1, (2, 64))
    assert (groups.amin(-1) == 0).all()
    assert (groups.amax(-1) == 7).all()


@pytest.mark.parametrize(("scale_bits", "zero_bits"), list(product(META_BITS, META_BITS)))
@pytest.mark.parametrize("in_features", [128, 70])
def test_what_is_stored_is_the_grid_the_codes_were_chosen_for(
    scale_bits: int, zero_bits: int, in_features: int
) -> None:
    encoding = Encoding(3, 32, scale_bits, zero_bits)
    weight = normal(2, 40, in_features)
    grid = half_quadratic(weight, minmax_grid(weight, encoding), encoding)
    codes = encode(weight, grid, encoding)
    tensors = grid_tensors(grid, encoding) | _code_tensors(codes, encoding)
    groups = encoding.groups(in_features)
    torch.testing.assert_close(scales(tensors, encoding, groups), grid.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(zeros(tensors, encoding, groups), grid.zero, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        dequantize(tensors, encoding, in_features), decode(codes, grid, encoding), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bits", [6, 8])
def test_rounding_to_stored_form_twice_changes_nothing(bits: int) -> None:
    encoding = Encoding(scale_bits=bits, zero_bits=bits)
    scale = normal(1, 40, 5).abs() + 1e-4
    once = round_scale(scale, encoding)
    assert torch.equal(round_scale(once, encoding), once)
    zero = round_zero(normal(1, 40, 5, seed=1) * 60, encoding)
    assert torch.equal(round_zero(zero, encoding), zero)


@pytest.mark.parametrize("bits", META_BITS)
def test_scales_stay_positive_however_small(bits: int) -> None:
    scale = torch.tensor([[[1.0, 1e-3, 1e-9, 0.0]]])
    assert (round_scale(scale, Encoding(scale_bits=bits)) > 0).all()


@pytest.mark.parametrize("zero_bits", META_BITS)
@pytest.mark.parametrize("value", [0.25, -3.0, 1e-5, 40000.0])
def test_all_equal_groups_keep_their_value(value: float, zero_bits: int) -> None:
    weight = torch.full((1, 33, 70), value)
    encoding = Encoding(zero_bits=zero_bits)
    grid = minmax_grid(weight, encoding)
    rebuilt = decode(encode(weight, grid, encoding), grid, encoding)
    step = 2**-10 if abs(value) > 1e-4 else 2**-6  # fp16 scales; near 1e-5 they are subnormal
    torch.testing.assert_close(rebuilt, weight, rtol=step, atol=0)


@pytest.mark.parametrize("zero_bits", META_BITS)
def test_an_all_zero_matrix_is_exact(zero_bits: int) -> None:
    weight = torch.zeros(2, 40, 96)
    encoding = Encoding(zero_bits=zero_bits)
    grid = minmax_grid(weight, encoding)
    assert torch.equal(decode(encode(weight, grid, encoding), grid, encoding), weight)


def test_a_narrow_group_far_from_zero_does_not_overflow_its_zero() -> None:
    """Range 1e-4 around 10: fp16 could not hold the zero that the range alone asks for."""
    weight = 10 + normal(1, 40, 64) * 1e-3
    encoding = Encoding()
    grid = minmax_grid(weight, encoding)
    assert grid.zero.abs().max() <= 512
    assert ((decode(encode(weight, grid, encoding), grid, encoding) - weight).abs() <= 10 / 512).all()


def test_groups_repeat_the_last_column_and_counts_know_it() -> None:
    weight = torch.arange(70.0).reshape(1, 1, 70)
    groups = to_groups(weight, 32)
    assert groups.shape == (1, 1, 3, 32)
    assert groups[0, 0, 2].tolist() == [*range(64, 70), *[69] * 26]
    assert group_counts(70, 32, torch.device("cpu")).tolist() == [32, 32, 6]
    assert group_counts(64, 32, torch.device("cpu")).tolist() == [32, 32]
