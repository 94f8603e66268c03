"""The kernels for many tokens an expert, called directly, against float64; helpers and bounds are `operators`'s."""

from __future__ import annotations

import pytest
import torch
from test_ops import COMPACT

from milo import ops
from milo.format.matrix import Encoding
from milo.kernels import prefill
from milo.kernels.prefill_config import CONFIGS, Config
from operators import DTYPES, RANKS, Block, check, experts_of, route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)), reason="needs sm_90"
    ),
]


@pytest.fixture(scope="module")
def block() -> Block:
    return Block(256, 224, [RANKS, RANKS[1:] + RANKS[:1], RANKS[2:] + RANKS[:2]], Encoding())


def ffn(
    made: Block,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    return prefill.moe_ffn(x, made.gate_up, made.down, ids, weights, activation, expert_map)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9, 65, 130, 300, 777, 1500])
def test_moe_tokens(block: Block, dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
    ids, weights = route(tokens, 8, 2, tokens)
    check(ffn(block, x, ids, weights), block.expected(x, ids, weights))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.width))
@pytest.mark.parametrize("tokens", [9, 500])
def test_moe_configurations(block: Block, config: Config, tokens: int) -> None:
    """Every configuration takes any number of tokens an expert."""
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = route(tokens, 8, 2, tokens)
    y = prefill.moe_ffn(x, block.gate_up, block.down, ids, weights, "silu", None, config)
    check(y, block.expected(x, ids, weights))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.width))
def test_linear_configurations(config: Config) -> None:
    shape, encoding = (416, 1120), Encoding()
    (matrix,), (weight,) = experts_of(shape, [33], encoding, 5)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    x = torch.randn(170, shape[1], device="cuda", dtype=torch.float16)
    check(prefill.linear(x, packed, None, config), x.double().cpu() @ weight.T)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(96, 160), (352, 96), (160, 544)])
def test_moe_encodings(bits: int, group_size: int, shape: tuple[int, int]) -> None:
    """Ragged shapes: rows and columns end within a tile, and the last group of row tiles is not full."""
    made = Block(*shape, [[0, 5], [16, 0], [40, 3]], Encoding(bits=bits, group_size=group_size))
    for dtype in DTYPES:
        x = torch.randn(150, shape[0], device="cuda", dtype=dtype)
        ids, weights = route(150, 2, 1)
        check(ffn(made, x, ids, weights), made.expected(x, ids, weights))


@pytest.mark.parametrize("ranks", [[1024, 0], [0, 0], [300, 17]], ids=str)
def test_moe_ranks(ranks: list[int]) -> None:
    made = Block(320, 256, [ranks, ranks, ranks[::-1]], Encoding())
    x = torch.randn(333, 320, device="cuda", dtype=torch.float16)
    ids, weights = route(333, 2, 2)
    check(ffn(made, x, ids, weights), made.expected(x, ids, weights))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_moe_activations(block: Block, activation: str) -> None:
    x = torch.randn(100, 256, device="cuda", dtype=torch.float16)
    ids, weights = route(100, 8, 2)
    check(ffn(block, x, ids, weights, activation), block.expected(x, ids, weights, activation))


def test_moe_one_expert_takes_all_and_ids_may_repeat(block: Block) -> None:
    x = torch.randn(400, 256, device="cuda", dtype=torch.float16)
    ids = torch.full((400, 2), 3, device="cuda", dtype=torch.int32)
    weights = torch.rand(400, 2, device="cuda")
    check(ffn(block, x, ids, weights), block.expected(x, ids, weights))


def test_moe_expert_map(block: Block) -> None:
    """Half of the global experts are elsewhere; ids out of range are skipped too."""
    x = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = route(200, 16, 4)
    ids[0, 0], ids[7, 1] = 99, -5
    table = torch.full((16,), -1, dtype=torch.int32)
    table[1::2] = torch.arange(8, dtype=torch.int32).flip(0)
    known = (ids.cpu() >= 0) & (ids.cpu() < 16)
    local = torch.where(known, table[ids.cpu().clamp(0, 15)].long(), -1)
    y = ffn(block, x, ids, weights, expert_map=table.cuda())
    check(y, block.expected(x, local, weights))


def test_moe_no_local_expert_gives_zeros(block: Block) -> None:
    x = torch.randn(70, 256, device="cuda", dtype=torch.float16)
    ids = torch.full((70, 2), -1, device="cuda")
    assert not ffn(block, x, ids, torch.rand(70, 2, device="cuda")).any()


def test_moe_weights_in_16_bits(block: Block) -> None:
    x = torch.randn(70, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = route(70, 8, 2)
    weights = weights.bfloat16()
    check(ffn(block, x, ids, weights), block.expected(x, ids, weights))


def test_moe_many_experts() -> None:
    made = Block(128, 64, [[3] * 100, [0] * 100, [16] * 100], Encoding())
    x = torch.randn(500, 128, device="cuda", dtype=torch.float16)
    ids, weights = route(500, 100, 8)
    check(ffn(made, x, ids, weights), made.expected(x, ids, weights))


def test_moe_in_turns(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_MAX_TOKENS", 128)
    x = torch.randn(300, 256, device="cuda", dtype=torch.float16)
    ids, weights = route(300, 8, 2)
    check(ffn(block, x, ids, weights), block.expected(x, ids, weights))


def test_moe_repeats_bit_for_bit_and_in_a_graph() -> None:
    """Large enough that all blocks run, with V x in parts of K: nothing may depend on who comes first."""
    made = Block(1024, 512, [[32] * 4] * 3, Encoding())
    x = torch.randn(600, 1024, device="cuda", dtype=torch.bfloat16)
    ids, weights = route(600, 4, 2)
    first = ffn(made, x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ffn(made, x, ids, weights)
    for _ in range(20):
        graph.replay()
        assert torch.equal(first, captured)
        assert torch.equal(first, ffn(made, x, ids, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 8, 17, 32, 1024])
@pytest.mark.parametrize("tokens", [65, 300])
def test_linear(dtype: torch.dtype, rank: int, tokens: int) -> None:
    shape, encoding = (416, 1120), Encoding()
    (matrix,), (weight,) = experts_of(shape, [rank], encoding, rank)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    check(prefill.linear(x, packed, None), x.double().cpu() @ weight.T)
    check(prefill.linear(x, packed, bias), x.double().cpu() @ weight.T + bias.double().cpu())


@pytest.mark.parametrize("encoding", COMPACT, ids=str)
def test_linear_with_compact_metadata_and_wide_codes(encoding: Encoding) -> None:
    shape = (416, 1152)
    (matrix,), (weight,) = experts_of(shape, [17], encoding, 3)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    for dtype in DTYPES:
        x = torch.randn(130, shape[1], device="cuda", dtype=dtype)
        check(prefill.linear(x, packed, None), x.double().cpu() @ weight.T)


def test_large_activations_keep_their_precision() -> None:
    shape, encoding = (128, 512), Encoding()
    (matrix,), (weight,) = experts_of(shape, [32], encoding, 7)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    for scale, shift in ((1e-3, 0), (1, 5), (1000, 0)):
        x = (torch.randn(70, 512, device="cuda") * scale + shift).half()
        check(prefill.linear(x, packed, None), x.double().cpu() @ weight.T)
