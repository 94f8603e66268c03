"""Modules over packed tensors: the numbers of the reconstruction, members kept apart, experts as the model has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from milo.format.matrix import BITS, Encoding
from milo.kernels.reference import dequantize, linear, reconstruct
from milo.modules.experts import CompressedExperts, Projection, compress_experts
from milo.modules.matrix import CompressedLinear, CompressedMatrix
from milo.solve.stack import Solved, solve_stack

ENCODINGS = [*(Encoding(b) for b in BITS), Encoding(3, 32, 6, 8, "int8"), Encoding(8, 128, 8, 6, "fp16")]


def solve(shape: tuple[int, ...], ranks: list[int], encoding: Encoding, seed: int = 0) -> list[Solved]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return solve_stack(weight, ranks, encoding, rounds=2)


def activations(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("rank", [0, 5])
def test_the_reference_linear_is_a_product_with_the_reconstruction(encoding: Encoding, rank: int) -> None:
    tensors = solve((1, 40, 70), [rank], encoding)[0].tensors
    x, bias = activations(2, 3, 70), activations(40, seed=2)
    expected = F.linear(x, reconstruct(tensors, encoding, (40, 70)), bias)
    torch.testing.assert_close(linear(x, tensors, encoding, (40, 70), bias), expected, rtol=1e-4, atol=1e-5)
    assert (linear(x, tensors, encoding, (40, 70)) - (expected - bias)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_product_has_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    tensors = solve((1, 40, 70), [5], Encoding())[0].tensors
    x = activations(4, 70)
    got = linear(x.to(dtype), tensors, Encoding(), (40, 70))
    assert got.dtype == dtype
    expected = linear(x, tensors, Encoding(), (40, 70))
    assert (got.float() - expected).norm() < (0.02 if dtype != torch.float64 else 1e-5) * expected.norm()


def test_dequantizing_a_stack_is_dequantizing_its_members() -> None:
    encoding = Encoding(3, 32, 6, 6)
    solved = solve((3, 40, 70), [0, 0, 0], encoding)
    stack = {name: torch.stack([s.tensors[name] for s in solved]) for name in solved[0].tensors}
    together = dequantize(stack, encoding, 70)
    assert all(torch.equal(together[i], dequantize(s.tensors, encoding, 70)) for i, s in enumerate(solved))


def test_a_matrix_holds_what_it_is_filled_with() -> None:
    solved = solve((1, 40, 70), [5], Encoding())[0]
    matrix = CompressedMatrix(Encoding(), (40, 70), [5])
    matrix.fill(0, solved.tensors)
    assert {n: p.shape for n, p in matrix.named_parameters()} == {n: t.shape for n, t in solved.tensors.items()}
    assert not any(p.requires_grad for p in matrix.parameters())
    assert torch.equal(matrix.reconstruct(), reconstruct(solved.tensors, Encoding(), (40, 70)))
    x = activations(3, 70)
    assert torch.equal(matrix(x), linear(x, solved.tensors, Encoding(), (40, 70)))
    assert "in=70, out=40, bits=3, group=64, rank=5 int3" in repr(matrix)


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(8, 32, 6, 8, "fp16")], ids=str)
@pytest.mark.parametrize("ranks", [[3, 0, 8, 1], [0, 0, 0, 0], [2, 2, 2, 2]])
def test_a_stack_keeps_its_members_apart(ranks: list[int], encoding: Encoding) -> None:
    solved = solve((4, 40, 70), ranks, encoding)
    matrix = CompressedMatrix(encoding, (40, 70), ranks, stacked=True)
    for member in (2, 0, 3, 1):
        matrix.fill(member, solved[member].tensors)
    x = activations(3, 70)
    for member, one in enumerate(solved):
        assert torch.equal(matrix.reconstruct(member), reconstruct(one.tensors, encoding, (40, 70)))
        assert torch.equal(matrix(x, member), linear(x, one.tensors, encoding, (40, 70)))
    assert f"rank={sum(ranks)} {encoding.factor}, stack of 4" in repr(matrix)


@pytest.mark.parametrize("bias", [True, False])
def test_a_compressed_linear_stands_in_for_a_linear(bias: bool) -> None:
    original = nn.Linear(70, 40, bias=bias)
    solved = solve_stack(original.weight.data[None], [40], Encoding(8), rounds=1)[0]
    new = CompressedLinear.like(original, Encoding(8), 40, "cpu")
    new.fill(0, solved.tensors)
    assert (new.in_features, new.out_features) == (70, 40)
    assert new.bias is original.bias
    torch.testing.assert_close(new.weight, original.weight.data, rtol=0, atol=2e-3)
    x = activations(2, 3, 70)
    torch.testing.assert_close(new(x), original(x), rtol=0, atol=2e-2)


def test_only_the_bias_of_a_compressed_linear_changes_its_dtype() -> None:
    new = CompressedLinear(Encoding(scale_bits=6), (40, 70), 3, True, torch.float32)
    nn.init.zeros_(new.bias)
    dtypes = {n: p.dtype for n, p in new.named_parameters() if n != "bias"}
    assert set(dtypes.values()) == {torch.int32, torch.float16, torch.uint8}
    for changed in (new.bfloat16(), new.double(), new.to(torch.float32), new.half()):
        assert {n: p.dtype for n, p in changed.named_parameters() if n != "bias"} == dtypes
    assert new.bias.dtype == torch.float16


def test_moving_to_a_device_moves_everything() -> None:
    new = CompressedLinear(Encoding(), (40, 70), 3, True, torch.float32)
    assert {p.device.type for p in new.to("meta", torch.bfloat16).parameters()} == {"meta"}
    assert new.weight_scale.dtype == torch.float16
    assert new.bias.dtype == torch.bfloat16


def test_a_projection_concatenates_its_parts_over_out_features() -> None:
    gates, ups = ([CompressedMatrix(Encoding(), (40, 70), [r]) for r in (2, 0, 3)] for _ in range(2))
    for i, matrices in enumerate((gates, ups)):
        for matrix, solved in zip(matrices, solve((3, 40, 70), [2, 0, 3], Encoding(), seed=i), strict=True):
            matrix.fill(0, solved.tensors)
    x = activations(5, 70)
    both = Projection([gates, ups])
    for expert in range(3):
        assert torch.equal(both(x, expert), torch.cat([gates[expert](x), ups[expert](x)], dim=-1))
        assert torch.equal(Projection([gates])(x, expert), gates[expert](x))


def exact_block(model_type: str) -> tuple[nn.Module, nn.Module]:
    """An experts block as the model has it, and the same compressed at 8 bits and full rank: all but exact."""
    before = next(iter(zoo.expert_modules(zoo.tiny_model(model_type)).values()))
    after = next(iter(zoo.expert_modules(zoo.tiny_model(model_type)).values()))
    projections = {}
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if name in after._parameters:
            weight = after._parameters.pop(name)
            weight = weight.data.mT if after.is_transposed else weight.data
            full, encoding = min(weight.shape[1:]), Encoding(8, 32, factor="fp16")
            ranks = [full] * len(weight)
            matrix = CompressedMatrix(encoding, tuple(weight.shape[1:]), ranks, stacked=True)
            for member, solved in enumerate(solve_stack(weight, ranks, encoding, rounds=2)):
                matrix.fill(member, solved.tensors)
            projections[name] = Projection([[matrix]])
    compress_experts(after, projections)
    return before, after


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_a_compressed_block_computes_what_the_models_own_block_computes(model_type: str) -> None:
    """Gated, with biases and a transposed layout, without a gate: everything but the products is inherited."""
    before, after = exact_block(model_type)
    assert isinstance(after, CompressedExperts)
    assert isinstance(after, type(before))
    x, chosen = activations(6, 64), torch.tensor([[0, 1], [1, 3], [2, 0], [3, 1], [1, 0], [2, 3]])
    weights = activations(6, 2, seed=5).softmax(-1)
    with torch.no_grad():
        expected, got = before(x, chosen, weights), after(x, chosen, weights)
    assert expected.norm() > 0
    assert (got - expected).norm() < 2e-3 * expected.norm()


def test_expert_numbers_beyond_the_block_are_skipped() -> None:
    """Expert parallelism hands every token to every rank, with such a number for the experts that live elsewhere."""
    _, after = exact_block("mixtral")
    x, weights = activations(3, 64), torch.full((3, 2), 0.5)
    with torch.no_grad():
        some = after(x, torch.tensor([[0, 4], [4, 4], [1, 4]]), weights)
        one = after(x[:1], torch.tensor([[0, 0]]), torch.tensor([[0.5, 0.0]]))
    assert not some[1].any()
    torch.testing.assert_close(some[:1], one)
