"""The solver's Triton kernels compile for Hopper, on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

FLOATS = "*fp32"
SIZES = {"n_groups": "i32", "groups": "i32", "in_features": "i32", "size_of_member": "i32"}
TILE = {"SIZE": 64, "BLOCK": 8, "RAGGED": False}
SEARCH = dict.fromkeys(("target", "scale", "zero", "zeros", "errors"), FLOATS) | SIZES | {"zero_step": "fp32"}
STEPS = {"STEPS": 20, "BETA": 10.0, "KAPPA": 1.01, "SHRINK": 0.99, "P_NORM": 0.7, "MAX_ZERO": 512.0}
QUANTISE = dict.fromkeys(("target", "weight", "scale", "zero"), FLOATS) | {"codes": "*u8", "residual": "*bf16"}

KERNELS: dict[str, tuple[str, dict[str, str], dict[str, Any], int]] = {
    "search": ("search", SEARCH, TILE | STEPS | {"MAX_CODE": 7, "ZERO_TOP": 0, "START": True}, 1),
    "search, ragged, given": (
        "search",
        SEARCH,
        TILE | STEPS | {"MAX_CODE": 15, "ZERO_TOP": 255, "START": False, "RAGGED": True, "SIZE": 32, "BLOCK": 16},
        1,
    ),
    "quantise": (
        "quantise",
        QUANTISE | {"squares": FLOATS} | SIZES,
        TILE | {"BLOCK": 32, "MAX_CODE": 7, "KEEP": True, "SAME": False},
        4,
    ),
    "retarget": (
        "retarget",
        {"weight": FLOATS, "product": "*bf16", "scale": FLOATS, "target": FLOATS}
        | SIZES
        | {"amplitude": "fp32", "seed": "i32"},
        TILE | {"BLOCK": 32, "NOISE": True},
        4,
    ),
    "round_rows": (
        "round_rows",
        {"rows": FLOATS, "fractions": FLOATS, "codes": "*u8", "scales": "*fp16"}
        | {"n_groups": "i32", "groups": "i32", "length": "i32"},
        TILE | {"LOW": -4, "HIGH": 3, "CANDIDATES": 9},
        1,
    ),
    "pack": (
        "pack",
        {"codes": "*u8", "stream": "*u8", "n_octets": "i32", "row_octets": "i32", "length": "i32"},
        {"BITS": 3, "BLOCK": 512},
        4,
    ),
}


KERNELS |= {
    f"whiten, {size} columns": (
        "whiten",
        {"gram": FLOATS, "inverse": FLOATS, "width": "i32", "shift": "fp32"},
        {"SIZE": size, "UNIT": True},
        size // 8,
    )
    for size in (64, 128)
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from milo.kernels.solver import gram, groups

    kernel, signature, constants, warps = KERNELS[name]
    source = ASTSource(
        fn=getattr(groups, kernel, None) or getattr(gram, kernel),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
