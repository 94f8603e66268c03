"""The prefill kernels' own sources on the CPU (tests/emulator), against float64; `tests/gpu/test_prefill.py` has more.

Few processors take many units each, of V, of several items an expert, and of less than four row tiles.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import emulator
from milo import ops
from milo.format.matrix import Encoding
from milo.kernels import prefill
from milo.kernels.prefill_config import CONFIGS, Config
from operators import Block, check, experts_of, route


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator")


@pytest.mark.parametrize("config", [CONFIGS[0], Config(96)], ids=str)
def test_moe(folder: Path, config: Config) -> None:
    """Unequal ranks, a ragged shape, ids that are elsewhere; the first expert has two items."""
    made = Block(320, 160, [[0, 17, 33], [40, 3, 0], [16, 0, 70]], Encoding(), device="cpu")
    x = torch.randn(130, 320, dtype=torch.bfloat16)
    ids, weights = route(130, 4, 2, 1, "cpu")
    ids[:60, 0] = 0
    table = torch.tensor([0, 2, -1, 1], dtype=torch.int32)
    with emulator.emulated_prefill(folder, 3):
        y = prefill.moe_ffn(x, made.gate_up, made.down, ids, weights, "silu", table, config)
        again = prefill.moe_ffn(x, made.gate_up, made.down, ids, weights, "silu", table, config)
    check(y, made.expected(x, table[ids].long(), weights))
    assert torch.equal(y, again)


def test_linear(folder: Path) -> None:
    """In-features beyond the ring's length, so that the warpgroups lag; V x in parts of K."""
    shape, encoding = (288, 1120), Encoding()
    (matrix,), (weight,) = experts_of(shape, [70], encoding, 5)
    packed = ops.repack([[matrix]], encoding, shape)
    x, bias = torch.randn(90, shape[1], dtype=torch.float16), torch.randn(shape[0], dtype=torch.float16)
    with emulator.emulated_prefill(folder, 4):
        y = prefill.linear(x, packed, bias, Config(96))
    check(y, x.double() @ weight.T + bias.double())
