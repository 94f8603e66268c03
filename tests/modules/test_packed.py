"""Matrices in the kernels' layout: the same numbers, nothing held twice, and saved bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoo
from milo.checkpoint.source import Checkpoint
from milo.format.matrix import Encoding
from milo.modules.experts import CompressedExperts, Projection, compress_experts
from milo.modules.matrix import CompressedLinear, CompressedMatrix
from milo.modules.packed import PackedWeight, gate_activation, use_kernels
from milo.solve.stack import solve_stack

IDS = torch.arange(3, 19).reshape(2, 8)


def compressed_linear(encoding: Encoding, shape: tuple[int, int] = (96, 160), rank: int = 5) -> CompressedLinear:
    weight = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3)) * 0.05
    linear = CompressedLinear(encoding, shape, rank, True, torch.float32)
    nn.init.normal_(linear.bias)
    linear.fill(0, solve_stack(weight, [rank], encoding, rounds=2)[0].tensors)
    return linear


@pytest.fixture
def loaded(compressed_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(compressed_folder, dtype=torch.float32)


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(4, 32, 6, 6), Encoding(8, 64, 6, 8)], ids=str)
def test_a_linear_computes_the_same_and_gives_its_tensors_up(encoding: Encoding) -> None:
    linear = compressed_linear(encoding, (96, 192))
    x, before = torch.randn(2, 3, 192), {name: t.clone() for name, t in linear.state_dict().items()}
    expected, weight = linear(x), linear.weight
    assert use_kernels(linear, "cpu") == {}
    assert linear.released
    assert set(dict(linear.named_parameters())) == {"bias"}
    torch.testing.assert_close(linear(x), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(linear.weight, weight)
    after = linear.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_computes_the_same_and_is_held_once(loaded: PreTrainedModel) -> None:
    stored = sum(p.nbytes for m in loaded.modules() if isinstance(m, CompressedMatrix) for p in m.parameters())
    with torch.no_grad():
        expected = loaded(IDS).logits
        assert use_kernels(loaded, "cpu") == {}
        assert use_kernels(loaded, "cpu") == {}  # a second time there is nothing left to do
        got = loaded(IDS).logits
    assert (got - expected).norm() < 1e-4 * expected.norm()
    held = [m for m in loaded.modules() if isinstance(m, CompressedMatrix) and not m.released]
    assert held == []
    packed = sum(m.matrix.nbytes for m in loaded.modules() if isinstance(m, PackedWeight))
    assert packed < 2.5 * stored  # tiny matrices fill whole tiles and steps of 16 ranks; large ones do not
    assert any(m.activation == "silu" for m in loaded.modules() if isinstance(m, CompressedExperts))


def test_a_model_in_the_kernels_layout_is_saved_bit_for_bit(
    loaded: PreTrainedModel, compressed_folder: Path, tmp_path: Path
) -> None:
    use_kernels(loaded, "cpu")
    loaded.to(torch.bfloat16).to(torch.float32)  # may not touch what is packed
    copy.deepcopy(loaded).save_pretrained(tmp_path)
    before, after = Checkpoint(compressed_folder), Checkpoint(tmp_path)
    assert before.tensors.keys() == after.tensors.keys()
    packed = [name for name in before.tensors if "weight_" in name or "lowrank" in name]
    assert all(torch.equal(before.read(name), after.read(name)) for name in packed)


@pytest.mark.parametrize("ranks", [[3, 0, 17], [0, 0, 0]])
def test_experts_stored_as_stacks(ranks: list[int]) -> None:
    """Gate and up in one tensor of all experts: cut over out-features on the way in, joined on the way out."""
    experts = next(iter(zoo.expert_modules(zoo.tiny_model("mixtral")).values()))
    experts.num_experts = 3
    hidden, projections = 96, {}
    for name, shape in (("gate_up_proj", (256, hidden)), ("down_proj", (hidden, 128))):
        del experts._parameters[name]
        matrix = CompressedMatrix(Encoding(), shape, ranks, stacked=True)
        weight = torch.randn(3, *shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
        for member, solved in enumerate(solve_stack(weight, ranks, Encoding(), rounds=1)):
            matrix.fill(member, solved.tensors)
        projections[name] = Projection([[matrix]])
    compress_experts(experts, projections)
    x, ids, weights = torch.randn(5, hidden), torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2]]), torch.rand(5, 2)
    stacks = [projections[name].parts[0][0] for name in projections]
    before = [{n: t.clone() for n, t in stack.state_dict().items()} for stack in stacks]
    expected = experts(x, ids, weights)
    assert use_kernels(nn.Sequential(experts), "cpu") == {}
    assert all(stack.released for stack in stacks)
    torch.testing.assert_close(experts(x, ids, weights), expected, rtol=1e-4, atol=1e-4)
    for stack, tensors in zip(stacks, before, strict=True):
        after = stack.state_dict()
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("encoding", "shape", "words"),
    [
        (Encoding(bits=5), (96, 160), "codes of 5 bits"),
        (Encoding(factor="int8"), (96, 160), "int8 compensators"),
        (Encoding(), (96, 150), "the shape"),
    ],
)
def test_what_the_kernels_do_not_take_keeps_the_reference_path(
    encoding: Encoding, shape: tuple[int, int], words: str
) -> None:
    holder = nn.Sequential(compressed_linear(encoding, shape))
    x = torch.randn(3, shape[1])
    expected = holder(x)
    assert words in use_kernels(holder, "cpu")["0"]
    assert torch.equal(holder(x), expected)
    assert not holder[0].released


def test_weights_elsewhere_are_left_alone() -> None:
    holder = nn.Sequential(compressed_linear(Encoding()))
    reason = use_kernels(holder)["0"]
    assert not holder[0].released
    assert reason  # no CUDA here, or the weights are on the CPU


@pytest.mark.parametrize(
    ("model_type", "activation"),
    [("mixtral", "silu"), ("qwen3_moe", "silu"), ("gpt_oss", None), ("gemma4", "gelu_tanh")],
)
def test_the_gate_is_found_by_trying_it(model_type: str, activation: str | None) -> None:
    experts = next(iter(zoo.expert_modules(zoo.tiny_model(model_type)).values()))
    assert gate_activation(experts) == activation
