"""Byte arithmetic of the format: what is promised is what the solver's tensors take, for every encoding."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milo.errors import PlanError
from milo.format.matrix import BITS, DTYPE_BYTES, FACTOR_BITS, GROUP_SIZES, META_BITS, Encoding, TensorSpec
from milo.solve.stack import solve_stack

DTYPES = {"I32": torch.int32, "F16": torch.float16, "U8": torch.uint8}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: TensorSpec(names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def solved_tensors(shape: tuple[int, int], rank: int, encoding: Encoding) -> dict[str, torch.Tensor]:
    weight = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return solve_stack(weight, [rank], encoding, grid="rtn", rounds=1)[0].tensors


@pytest.mark.parametrize("bits", BITS)
def test_the_solver_writes_exactly_the_promised_tensors_for_every_encoding(bits: int) -> None:
    for size, scale_bits, zero_bits in product(GROUP_SIZES, META_BITS, META_BITS):
        encoding = Encoding(bits, size, scale_bits, zero_bits)
        tensors = solved_tensors((33, 70), 0, encoding)
        assert specs_of(tensors) == encoding.tensors((33, 70), 0), encoding
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == encoding.nbytes((33, 70), 0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(32, 75),
    st.integers(32, 140),
    st.sampled_from([0, 1, 8, 17, "full"]),
    st.sampled_from(list(FACTOR_BITS)),
    st.sampled_from(BITS),
    st.sampled_from(GROUP_SIZES),
)
def test_odd_shapes_and_ranks_take_the_promised_bytes(
    n: int, k: int, rank: int | str, factor: str, bits: int, size: int
) -> None:
    encoding = Encoding(bits, size, factor=factor)
    number = min(n, k) if rank == "full" else int(rank)
    tensors = solved_tensors((n, k), number, encoding)
    assert specs_of(tensors) == encoding.tensors((n, k), number)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == encoding.nbytes((n, k), number)


def test_three_bits_in_groups_of_64_cost_three_and_a_half_bits() -> None:
    assert Encoding().nbytes((4096, 14336), 0) * 8 == 4096 * 14336 * 3.5


@pytest.mark.parametrize(
    ("encoding", "bits"),
    [
        (Encoding(2, 64), 2.5),
        (Encoding(4, 128), 4.25),
        (Encoding(6, 64), 6.5),
        (Encoding(8, 32), 9.0),
        (Encoding(3, 64, scale_bits=8, zero_bits=8), 3.25),
        (Encoding(3, 32, scale_bits=6, zero_bits=6), 3.375),
    ],
)
def test_bits_per_weight_by_hand(encoding: Encoding, bits: float) -> None:
    """Rows of 4096: the super-scale of a row adds two bytes where scales are fractions of it."""
    super_scales = 2 * 256 if encoding.scale_bits < 16 else 0
    assert encoding.nbytes((256, 4096), 0) == 256 * 4096 * bits / 8 + super_scales


@pytest.mark.parametrize("rank", [1, 8, 17, 31])
def test_no_rank_wastes_a_bit(rank: int) -> None:
    """Every rank costs exactly `rank` times rank 1: 3 bits an element and a 16-bit scale for 64 of them."""
    encoding = Encoding()
    factors = encoding.nbytes((256, 512), rank) - encoding.nbytes((256, 512), 0)
    assert factors * 8 == rank * (256 + 512) * (3 + 16 / 64)


def test_int8_and_fp16_factors_by_hand() -> None:
    base = Encoding().nbytes((256, 512), 0)
    assert Encoding(factor="int8").nbytes((256, 512), 3) - base == 3 * (256 + 512) * (8 + 16 / 64) / 8
    assert Encoding(factor="fp16").nbytes((256, 512), 3) - base == 3 * (256 + 512) * 2


def test_wide_codes_are_two_planes_that_share_a_scale() -> None:
    for bits, plane in ((6, 3), (8, 4)):
        encoding = Encoding(bits)
        tensors = encoding.tensors((40, 64), 0)
        assert (encoding.plane_bits, encoding.planes) == (plane, 2)
        assert tensors["weight_packed"] == tensors["weight_packed_hi"] == TensorSpec("I32", (40, 2 * plane))
        assert tensors["weight_scale"] == TensorSpec("F16", (40, 1))


def test_a_stack_leads_with_its_experts_and_concatenates_its_factors_along_the_rank() -> None:
    tensors = Encoding(scale_bits=6).tensors((5, 96, 64), 17)
    assert tensors["weight_packed"].shape == (5, 96, 6)
    assert tensors["weight_super_scale"].shape == (5, 96)
    assert tensors["lowrank_u"].shape == (17, 9)
    assert tensors["lowrank_u_scale"].shape == (17, 2)
    assert tensors["lowrank_v"].shape == (17, 6)


def test_rank_zero_has_no_factor_tensors() -> None:
    assert set(Encoding().tensors((40, 64), 0)) == {"weight_packed", "weight_scale", "weight_zero"}


def test_no_name_is_one_that_transformers_rewrites() -> None:
    names = {name for bits in BITS for name in Encoding(bits, scale_bits=6).tensors((40, 64), 1)}
    assert not any(name.endswith(("weight_v", "weight_g")) for name in names)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 7),
        ("bits", 0),
        ("bits", True),
        ("bits", 3.0),
        ("bits", "3"),
        ("group_size", 48),
        ("group_size", 256),
        ("scale_bits", 4),
        ("zero_bits", 7),
        ("factor", "int4"),
        ("factor", None),
    ],
)
def test_values_outside_the_format_are_refused_with_the_choices(field: str, value: Any) -> None:
    with pytest.raises(PlanError, match=rf"^{field} = .* is not supported; choose one of"):
        Encoding(**{field: value})


def test_spec_bytes_follow_the_dtype() -> None:
    for dtype, size in DTYPE_BYTES.items():
        assert TensorSpec(dtype, (3, 5)).nbytes == 15 * size
    assert TensorSpec("F16", ()).nbytes == 2
