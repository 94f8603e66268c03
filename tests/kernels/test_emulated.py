"""The decode kernels' own sources, compiled for the CPU and run thread by thread (tests/emulator), against float64.

Five blocks share the work, so that their stretches begin and end anywhere. What this cannot show: PTX, races that need
true concurrency, and speed; `tests/gpu/test_ops.py` runs the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import emulator
from milo import ops
from milo.format.matrix import Encoding
from milo.kernels import decode
from milo.kernels.cutting import CONFIGS, SPLIT, Config
from operators import RANKS, Block, check, experts_of, route, stacked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture(autouse=True)
def cpu(folder: Path) -> Iterator[None]:
    """The kernels run on the CPU, and leave their counters zero (those of `down` are zeroed by the next call)."""
    with emulator.emulated(folder) as counters:
        yield
    gate_up, _, linear = counters.memory
    assert not gate_up.any()
    assert not linear.any()


@pytest.fixture(scope="module")
def block() -> Block:
    return Block(256, 224, [RANKS, RANKS[1:] + RANKS[:1], RANKS[2:] + RANKS[:2]], Encoding(), device="cpu")


@pytest.mark.parametrize(
    ("tokens", "config", "dtype"),
    [
        (1, CONFIGS[0], torch.float16), (3, CONFIGS[0], torch.bfloat16), (8, CONFIGS[0], torch.float16),
        (20, CONFIGS[0], torch.float16), (17, CONFIGS[1], torch.bfloat16), (70, CONFIGS[1], torch.float16),
        (33, CONFIGS[2], torch.float16), (70, CONFIGS[2], torch.bfloat16), (17, SPLIT[1], torch.bfloat16),
        (30, SPLIT[2], torch.float16), (40, SPLIT[3], torch.float16),
    ],
)  # fmt: skip
def test_moe(block: Block, tokens: int, config: Config, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, 256, dtype=dtype)
    ids, weights = route(tokens, 8, 2, tokens, "cpu")
    y = decode.moe_ffn(x, block.gate_up, block.down, ids, weights, "silu", None, config)
    check(y, block.expected(x, ids, weights))
    again = decode.moe_ffn(x, block.gate_up, block.down, ids, weights, "silu", None, config)
    assert torch.equal(y, again)


@pytest.mark.parametrize("tokens", [2, 12])
def test_expert_map_and_ids_out_of_range(block: Block, tokens: int) -> None:
    x = torch.randn(tokens, 256, dtype=torch.float16)
    ids, weights = route(tokens, 16, 4, 0, "cpu")
    ids[0, 0] = 99
    table = torch.full((16,), -1, dtype=torch.int32)
    table[1::2] = torch.arange(8, dtype=torch.int32).flip(0)
    local = torch.where(ids < 16, table[ids.clamp(max=15)].long(), -1)
    y = decode.moe_ffn(x, block.gate_up, block.down, ids, weights, "gelu", table)
    check(y, block.expected(x, local, weights, "gelu"))


def test_no_local_expert_gives_zeros(block: Block) -> None:
    x, ids = torch.randn(4, 256, dtype=torch.float16), torch.full((4, 2), -1)
    assert not decode.moe_ffn(x, block.gate_up, block.down, ids, torch.rand(4, 2), "silu", None).any()


@pytest.mark.parametrize(("tokens", "config"), [(7, None), (40, None), (11, 1), (35, 2)])
def test_one_expert_takes_all_and_twice(block: Block, tokens: int, config: int | None) -> None:
    x, ids = torch.randn(tokens, 256, dtype=torch.float16), torch.full((tokens, 2), 3, dtype=torch.int32)
    weights = torch.rand(tokens, 2)
    chosen = None if config is None else CONFIGS[config]
    y = decode.moe_ffn(x, block.gate_up, block.down, ids, weights, "silu", None, chosen)
    check(y, block.expected(x, ids, weights))


def test_more_parts_than_the_queue_holds() -> None:
    """Hundreds of experts over five blocks: each has dozens of parts, some of V."""
    for experts, tokens, config in ((100, 1, 0), (100, 30, 0), (300, 60, 1)):
        made = Block(128, 64, [[3] * experts, [0] * experts, [16] * experts], Encoding(), device="cpu")
        x = torch.randn(tokens, 128, dtype=torch.float16)
        ids, weights = route(tokens, experts, 8, 0, "cpu")
        y = decode.moe_ffn(x, made.gate_up, made.down, ids, weights, "silu", None, CONFIGS[config])
        check(y, made.expected(x, ids, weights))


@pytest.mark.parametrize("config", [1, 2])
def test_row_tiles_that_warps_share(config: int) -> None:
    """Two groups of row tiles of which the last is small, and V's row tiles in two groups."""
    hidden, inner, ranks = 832, 352, [[300, 0], [16, 40], [8, 900]]
    made = Block(hidden, inner, ranks, Encoding(), device="cpu")
    x = torch.randn(20, hidden, dtype=torch.bfloat16)
    ids, weights = route(20, 2, 1, 0, "cpu")
    y = decode.moe_ffn(x, made.gate_up, made.down, ids, weights, "silu", None, CONFIGS[config])
    check(y, made.expected(x, ids, weights))


@pytest.mark.parametrize(
    ("bits", "group_size", "shape"), [(3, 32, (96, 160)), (4, 64, (352, 96)), (4, 128, (160, 544))]
)
def test_encodings(bits: int, group_size: int, shape: tuple[int, int]) -> None:
    made = Block(*shape, [[0, 5], [16, 0], [40, 3]], Encoding(bits=bits, group_size=group_size), device="cpu")
    for tokens, config in ((1, 0), (11, 1), (25, 2)):
        x = torch.randn(tokens, shape[0], dtype=torch.bfloat16)
        ids, weights = route(tokens, 2, 1, 0, "cpu")
        y = decode.moe_ffn(x, made.gate_up, made.down, ids, weights, "silu", None, CONFIGS[config])
        check(y, made.expected(x, ids, weights))


@pytest.mark.parametrize("rank", [0, 17, 1024])
def test_linear(rank: int) -> None:
    shape, encoding = (416, 1120), Encoding()
    (matrix,), (weight,) = experts_of(shape, [rank], encoding, rank)
    packed = ops.repack([[matrix]], encoding, shape)
    bias = torch.randn(shape[0], dtype=torch.float16)
    for tokens in (1, 8, 33):
        x = torch.randn(tokens, shape[1], dtype=torch.float16)
        check(decode.linear(x, packed, bias), x.double() @ weight.T + bias.double())


@pytest.mark.parametrize("rank", [0, 17])
def test_pieces_of_few_units_beside_blocks_of_v(rank: int) -> None:
    shape, encoding = (128, 3136), Encoding()
    (matrix,), (weight,) = experts_of(shape, [rank], encoding, rank)
    packed = ops.repack([[matrix]], encoding, shape)
    with patch.object(emulator.EmulatedKernels, "slots", 26):
        for tokens in (1, 33):
            x = torch.randn(tokens, shape[1], dtype=torch.float16)
            check(decode.linear(x, packed, None), x.double() @ weight.T)


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(6, 64, 6, 8)], ids=str)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (17, 0, 80)])
def test_stacked_linears(encoding: Encoding, ranks: tuple[int, ...]) -> None:
    """As many matrices as there are in one launch, each with its own rank; as views they are what they were."""
    packed, alone, weight = stacked(encoding, ranks, "cpu")
    bias = torch.randn(weight.shape[0], dtype=torch.float16)
    for tokens in (1, 8, 33):
        x = torch.randn(tokens, weight.shape[1], dtype=torch.float16)
        check(decode.linear(x, packed, bias), x.double() @ weight.T + bias.double())
    x = torch.randn(3, weight.shape[1], dtype=torch.float16)
    assert torch.equal(ops.linear(x, packed), torch.cat([ops.linear(x, m) for m in alone], -1))
