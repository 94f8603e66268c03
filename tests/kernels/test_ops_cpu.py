"""The operators without a GPU: the PyTorch path, the fakes, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch

from matrices import random_matrix
from milo import ops
from milo.format.matrix import Encoding
from milo.kernels import cutting, decode, packed_reference, prefill, prefill_config, reference
from operators import Block

ENCODING = Encoding()


def stack(shape: tuple[int, int], ranks: list[int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(shape[0])
    return [random_matrix(shape, rank, ENCODING, generator) for rank in ranks]


@pytest.fixture(scope="module")
def block() -> tuple[list[list[dict[str, torch.Tensor]]], ops.PackedMatrix, ops.PackedMatrix]:
    gate, up, down = stack((96, 128), [0, 3, 17]), stack((96, 128), [5, 0, 0]), stack((128, 96), [0, 2, 32])
    first = ops.repack([gate, up], ENCODING, (96, 128))
    return [gate, up, down], first, ops.repack([down], ENCODING, (128, 96))


def test_linear_equals_the_reference() -> None:
    (matrix,) = stack((96, 160), [9])
    x, bias = torch.randn(2, 3, 160), torch.randn(96)
    expected = reference.linear(x, matrix, ENCODING, (96, 160), bias)
    y = ops.linear(x, ops.repack([[matrix]], ENCODING, (96, 160)), bias)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_moe_ffn_equals_the_sum_over_experts(block: tuple) -> None:
    (gate, up, down), first, second = block
    x, ids, weights = torch.randn(7, 128), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)  # id 3 is nowhere
    expected = torch.zeros_like(x)
    for token in range(7):
        for choice in range(2):
            e = int(ids[token, choice])
            if e == 3:
                continue
            row = x[token]
            h = torch.nn.functional.silu(reference.linear(row, gate[e], ENCODING, (96, 128)))
            h = h * reference.linear(row, up[e], ENCODING, (96, 128))
            expected[token] += weights[token, choice] * reference.linear(h, down[e], ENCODING, (128, 96))
    torch.testing.assert_close(ops.moe_ffn(x, first, second, ids, weights), expected, atol=1e-4, rtol=1e-4)
    mapped = ops.moe_ffn(x, first, second, ids, weights, expert_map=torch.tensor([0, 1, 2, -1], dtype=torch.int32))
    torch.testing.assert_close(mapped, expected, atol=1e-4, rtol=1e-4)


def test_fakes_have_the_right_shapes(block: tuple) -> None:
    _, first, second = block
    arguments = (first.tensors, first.numbers, second.tensors, second.numbers)
    x, ids, weights = torch.randn(4, 128), torch.randint(0, 3, (4, 2)), torch.rand(4, 2)
    torch.library.opcheck(torch.ops.milo.moe_ffn.default, (x, *arguments, ids, weights, "silu", None))
    torch.library.opcheck(torch.ops.milo.linear.default, (torch.randn(4, 96), second.tensors, second.numbers, None))


def test_what_does_not_fit_is_refused(block: tuple) -> None:
    _, first, second = block
    x, ids, weights = torch.randn(4, 128), torch.randint(0, 3, (4, 2)), torch.rand(4, 2)
    with pytest.raises(ValueError, match="activation"):
        ops.moe_ffn(x, first, second, ids, weights, "relu")
    with pytest.raises(ValueError, match="do not fit"):
        ops.moe_ffn(x[:, :64], first, second, ids, weights)
    with pytest.raises(ValueError, match="int32 or int64"):
        ops.moe_ffn(x, first, second, ids.float(), weights)
    with pytest.raises(ValueError, match="one matrix"):
        ops.linear(x, second)


def test_support_says_why_not() -> None:
    for kernels in (decode, prefill):
        fits, reason = kernels.supports(torch.device("cpu"), torch.float16)
        assert not fits
        assert "reference" in reason


def test_prefill_is_compiled_ahead_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    packed = Block(64, 64, [[0], [0], [0]], Encoding(4, 32), device="cpu").down
    prefill.prepare(packed, torch.float16)  # a CPU: nothing to do
    monkeypatch.setattr(prefill, "supports", lambda *arguments: (True, ""))
    monkeypatch.setattr(prefill, "_kernels", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    prefill._prepared.cache_clear()
    for _ in range(2):
        prefill.prepare(packed, torch.bfloat16, "gelu")
    prefill._prepared.cache_clear()
    kind = packed_reference.ACTIVATIONS.index("gelu")
    assert {arguments[0] for arguments in made} == set(prefill_config.CONFIGS)
    assert {arguments[1:] for arguments in made} == {(4, 2, True, kind, None)}
    assert len(made) == len(prefill_config.CONFIGS)


def test_prefill_is_for_many_tokens_an_expert() -> None:
    assert prefill.prefers(512, 2, 8)
    assert prefill.prefers(4096, 8, 128)
    assert not prefill.prefers(64, 2, 8)  # 16 tokens an expert
    assert prefill.prefers(256, 8, 128)
    assert not prefill.prefers(128, 8, 128)
    assert prefill.prefers(128, 2, 8)
    assert not prefill.prefers_linear(64, 64, 1)  # measured: 4096 x 4096 from 100 to 190 tokens on, by its rank
    assert prefill.prefers_linear(256, 64, 1)
    assert prefill.prefers_linear(64, 224, 1)
    assert not prefill.prefers_linear(64, 224, 3)  # three launches one after the other


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("halves", [1, 2])
def test_the_ring_of_prefill_fits_into_a_block(bits: int, halves: int) -> None:
    for config in prefill_config.CONFIGS:
        stages, nbytes = config.ring(bits, halves)
        assert stages >= 5  # two of them between the warpgroups
        assert config.blocks * (nbytes + prefill_config.SLACK + 1024) <= 228 << 10


@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "rows", "columns", "width"),
    [
        (512, 2, 8, 14336, 4096, 160), (2048, 2, 8, 14336, 4096, 144),
        (128, 2, 8, 14336, 4096, 48), (256, 2, 8, 14336, 4096, 80), (256, 6, 64, 1408, 2048, 32),
        (512, 6, 64, 1408, 2048, 64), (512, 8, 128, 768, 2048, 48), (1024, 8, 128, 768, 2048, 80),
        (1024, 6, 64, 1408, 2048, 112), (2048, 6, 64, 1408, 2048, 112), (2048, 8, 128, 768, 2048, 160),
    ],
)  # fmt: skip
def test_prefill_takes_the_width_that_was_the_fastest(
    tokens: int, topk: int, experts: int, rows: int, columns: int, width: int
) -> None:
    """Of those measured at these shapes on an H100 (docs/log.md, prefill, second version, and narrow items)."""
    loads = (prefill.Load(2 * rows // 64, columns // 64), prefill.Load(columns // 64, rows // 64))
    assert prefill.choose(tokens, topk, experts, experts, loads, 132).width == width


def test_prefill_of_a_plain_matrix_fills_the_processors() -> None:
    one = prefill.Load(64, 64)
    assert prefill.choose(96, 1, 1, 1, (one,), 132).width == 48  # two items at a time
    few, many = (prefill.choose(tokens, 1, 1, 1, (one,), 132).width for tokens in (768, 4096))
    assert few == 96  # 8 items of 16 units each: one wave
    assert many >= 128


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("halves", [1, 2])
def test_configurations_fit_into_shared_memory(bits: int, halves: int) -> None:
    sm_90 = [cutting.fit(c, bits, halves, 228 << 10) for c in cutting.CONFIGS]
    assert None not in sm_90
    if (bits, halves) == (3, 1):
        assert tuple(sm_90) == cutting.CONFIGS
    sm_80 = [c for c in cutting.CONFIGS if cutting.fit(c, bits, halves, 164 << 10)]
    assert sm_80
    assert cutting.choose(500, 1000, 8, sm_80) == sm_80[-1]
