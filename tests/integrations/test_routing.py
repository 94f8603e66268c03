"""Routing counts: what `milo profile` measures is what the routers choose, under the names that plans use."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from milo.errors import UnsupportedModelError
from milo.integrations.transformers.memory import inventory_of
from milo.integrations.transformers.routing import routing_counts
from milo.plan.ranks import Evidence, assign_ranks


def ids(length: int) -> torch.Tensor:
    return torch.randint(8, 120, (length,), generator=torch.Generator().manual_seed(0))


def test_counts_are_the_routers_top_choices() -> None:
    model = zoo.tiny_model("mixtral")
    text = ids(50)
    counts = routing_counts(model, text, window=16)
    expected = {f"model.layers.{i}.block_sparse_moe.experts": torch.zeros(4, dtype=torch.int64) for i in range(2)}
    for start in range(0, 50, 16):
        with torch.no_grad():
            routers = model(text[start : start + 16][None], output_router_logits=True).router_logits
        for tally, choice in zip(expected.values(), routers, strict=True):
            tally += torch.bincount(choice.topk(2, dim=-1).indices.flatten(), minlength=4)
    assert counts == {path: tally.tolist() for path, tally in expected.items()}
    assert all(sum(tally) == 50 * 2 for tally in counts.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "gpt_oss", "nemotron_h"])
def test_counts_fit_the_frequency_policy(model_type: str) -> None:
    model = zoo.tiny_model(model_type)
    counts = routing_counts(model, ids(40))
    assert counts
    assert all(sum(tally) == 40 * 2 for tally in counts.values())
    inventory, _ = inventory_of(model)
    ranks, _ = assign_ranks(inventory.groups, "frequency:4", 64, Evidence(lambda group: [], counts))
    for group in inventory.groups:
        if group.experts_path in counts:
            shares = [round(4 * group.count * c / 80) for c in counts[group.experts_path]]
            assert ranks[group.name] == [min(s, *group.shape) for s in shares]


def test_progress_reaches_the_end() -> None:
    seen: list[float] = []
    routing_counts(zoo.tiny_model("mixtral"), ids(40), window=16, progress=lambda fraction, text: seen.append(fraction))
    assert seen == [pytest.approx(0.4), pytest.approx(0.8), 1.0]


def test_a_model_without_experts_has_nothing_to_count() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    with pytest.raises(UnsupportedModelError, match="no experts"):
        routing_counts(LlamaForCausalLM(config), ids(16))
