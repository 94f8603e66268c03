"""The CUDA operators against float64, on fresh random matrices at ragged sizes (bounds: tests/operators.py)."""

from __future__ import annotations

import pytest
import torch

from milo import ops
from milo.format.matrix import Encoding
from milo.kernels import cutting, decode, nvrtc
from operators import COMPACT, DTYPES, RANKS, Block, check, experts_of, route, stacked

ALL = list(dict.fromkeys(cutting.CONFIGS + cutting.SPLIT))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def block() -> Block:
    return Block(256, 224, [RANKS, RANKS[1:] + RANKS[:1], RANKS[2:] + RANKS[:2]], Encoding())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 130, 300])
def test_moe_tokens(block: Block, dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
    ids, weights = route(tokens, 8, 2, tokens)
    check(ops.moe_ffn(x, block.gate_up, block.down, ids, weights), block.expected(x, ids, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("tokens", [1, 5, 40, 150])
def test_moe_every_configuration(block: Block, dtype: torch.dtype, config: cutting.Config, tokens: int) -> None:
    """Balanced routing, and an expert that takes all while others get none; the same bits again."""
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
    ids, weights = route(tokens, 8, 3, tokens)
    for chosen in (ids, torch.where(ids < 4, 6, ids)):
        y = decode.moe_ffn(x, block.gate_up, block.down, chosen, weights, "silu", None, config)
        check(y, block.expected(x, chosen, weights))
        for _ in range(3):
            assert torch.equal(y, decode.moe_ffn(x, block.gate_up, block.down, chosen, weights, "silu", None, config))


@pytest.mark.parametrize("config", ALL)
def test_linear_every_configuration(config: cutting.Config) -> None:
    """Row tiles that warps share, a stretch of V in several groups, turns."""
    shape, encoding = (1632, 2080), Encoding()
    (matrix,), (weight,) = experts_of(shape, [1000], encoding, 5)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    for tokens in (5, 70):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        check(decode.linear(x, packed, None, config), x.double().cpu() @ weight.T)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(96, 160), (352, 96), (160, 544)])
def test_moe_encodings(bits: int, group_size: int, shape: tuple[int, int]) -> None:
    made = Block(*shape, [[0, 5], [16, 0], [40, 3]], Encoding(bits=bits, group_size=group_size))
    for tokens in (1, 11, 20, 60, 100):
        x = torch.randn(tokens, shape[0], device="cuda", dtype=torch.bfloat16)
        ids, weights = route(tokens, 2, 1)
        check(ops.moe_ffn(x, made.gate_up, made.down, ids, weights), made.expected(x, ids, weights))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_moe_activations(block: Block, activation: str) -> None:
    x = torch.randn(6, 256, device="cuda", dtype=torch.float16)
    ids, weights = route(6, 8, 2)
    y = ops.moe_ffn(x, block.gate_up, block.down, ids, weights, activation)
    check(y, block.expected(x, ids, weights, activation))


def test_moe_one_expert_takes_all_and_ids_may_repeat(block: Block) -> None:
    x = torch.randn(50, 256, device="cuda", dtype=torch.float16)
    ids = torch.full((50, 2), 3, device="cuda", dtype=torch.int32)
    weights = torch.rand(50, 2, device="cuda")
    check(ops.moe_ffn(x, block.gate_up, block.down, ids, weights), block.expected(x, ids, weights))
    few = slice(0, 9)
    y = ops.moe_ffn(x[few], block.gate_up, block.down, ids[few], weights[few])
    check(y, block.expected(x[few], ids[few], weights[few]))


@pytest.mark.parametrize("tokens", [2, 40])
def test_moe_expert_map(block: Block, tokens: int) -> None:
    """Half of the global experts are elsewhere; ids out of range are skipped too."""
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = route(tokens, 16, 4)
    ids[0, 0] = 99
    table = torch.full((16,), -1, dtype=torch.int32)
    table[1::2] = torch.arange(8, dtype=torch.int32).flip(0)
    local = torch.where(ids.cpu() < 16, table[ids.cpu().clamp(max=15)].long(), -1)
    y = ops.moe_ffn(x, block.gate_up, block.down, ids, weights, expert_map=table.cuda())
    check(y, block.expected(x, local, weights))


def test_moe_no_local_expert_gives_zeros(block: Block) -> None:
    x = torch.randn(4, 256, device="cuda", dtype=torch.float16)
    ids = torch.full((4, 2), -1, device="cuda")
    assert not ops.moe_ffn(x, block.gate_up, block.down, ids, torch.rand(4, 2, device="cuda")).any()


def test_moe_weights_in_16_bits(block: Block) -> None:
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = route(5, 8, 2)
    weights = weights.bfloat16()
    check(ops.moe_ffn(x, block.gate_up, block.down, ids, weights), block.expected(x, ids, weights))


def test_moe_many_experts() -> None:
    made = Block(128, 64, [[3] * 100, [0] * 100, [16] * 100], Encoding())
    for tokens in (1, 30, 64, 150):
        x = torch.randn(tokens, 128, device="cuda", dtype=torch.float16)
        ids, weights = route(tokens, 100, 8)
        check(ops.moe_ffn(x, made.gate_up, made.down, ids, weights), made.expected(x, ids, weights))


def test_moe_repeats_bit_for_bit_and_in_a_graph(block: Block) -> None:
    x = torch.randn(40, 256, device="cuda", dtype=torch.float16)
    ids, weights = route(40, 8, 2)
    first = ops.moe_ffn(x, block.gate_up, block.down, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.moe_ffn(x, block.gate_up, block.down, ids, weights)
    for _ in range(20):
        graph.replay()
        assert torch.equal(first, captured)
        assert torch.equal(first, ops.moe_ffn(x, block.gate_up, block.down, ids, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 8, 17, 32, 1024])
@pytest.mark.parametrize("tokens", [1, 8, 33, 300])
def test_linear(dtype: torch.dtype, rank: int, tokens: int) -> None:
    shape, encoding = (416, 1120), Encoding()
    (matrix,), (weight,) = experts_of(shape, [rank], encoding, rank)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    check(ops.linear(x, packed), x.double().cpu() @ weight.T)
    check(ops.linear(x, packed, bias), x.double().cpu() @ weight.T + bias.double().cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", [Encoding(), Encoding(6, 64, 6, 8)], ids=str)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (17, 0, 80)])
def test_stacked_linears(dtype: torch.dtype, encoding: Encoding, ranks: tuple[int, ...]) -> None:
    packed, _, weight = stacked(encoding, ranks)
    bias = torch.randn(weight.shape[0], device="cuda", dtype=dtype)
    for tokens in (1, 8, 33, 130):
        x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=dtype)
        check(ops.linear(x, packed, bias), x.double().cpu() @ weight.T + bias.double().cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", COMPACT, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 33, 130])
def test_linear_with_compact_metadata_and_wide_codes(dtype: torch.dtype, encoding: Encoding, tokens: int) -> None:
    shape = (416, 1152)
    (matrix,), (weight,) = experts_of(shape, [17], encoding, 3)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
    check(ops.linear(x, packed), x.double().cpu() @ weight.T)


@pytest.mark.parametrize("tokens", [1, 20])
def test_moe_with_compact_metadata(tokens: int) -> None:
    made = Block(256, 224, [RANKS, RANKS, RANKS], Encoding(3, 64, 6, 6))
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.float16)
    ids, weights = route(tokens, 8, 2)
    check(ops.moe_ffn(x, made.gate_up, made.down, ids, weights), made.expected(x, ids, weights))


def test_large_activations_keep_their_precision() -> None:
    """Means far from zero stress the zero-point correction; large values stress the range of fp16."""
    shape, encoding = (128, 512), Encoding()
    (matrix,), (weight,) = experts_of(shape, [32], encoding, 7)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, shape)
    for scale, shift in ((1e-3, 0), (1, 5), (1000, 0)):
        x = (torch.randn(4, 512, device="cuda") * scale + shift).half()
        check(ops.linear(x, packed), x.double().cpu() @ weight.T)


@pytest.mark.parametrize("op", ["linear", "moe_ffn"])
def test_compiles_without_a_graph_break(block: Block, op: str) -> None:
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = route(4, 8, 2)
    encoding = Encoding()
    (matrix,), _ = experts_of((64, 256), [8], encoding, 1)
    packed = ops.repack([[{n: t.cuda() for n, t in matrix.items()}]], encoding, (64, 256))

    def call(x: torch.Tensor) -> torch.Tensor:
        if op == "linear":
            return ops.linear(x, packed) * 2
        return ops.moe_ffn(x, block.gate_up, block.down, ids, weights) * 2

    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(compiled(x).clone(), call(x), rtol=0, atol=0)


def test_the_kernels_of_sm_80(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an A100 would run, compiled by the driver from PTX for it: without programmatic dependent launch."""
    monkeypatch.setattr(nvrtc, "architecture", lambda device, own: "compute_80")
    decode._kernels.cache_clear()
    try:
        for tokens in (1, 8, 40):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            ids, weights = route(tokens, 8, 2)
            y = decode.moe_ffn(x, block.gate_up, block.down, ids, weights, "silu", None)
            check(y, block.expected(x, ids, weights))
    finally:
        decode._kernels.cache_clear()
