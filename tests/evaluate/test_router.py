"""Router agreement against the routers' own logits, on the passes that the divergence makes anyway."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from judged import VOCABULARY, tiny_mixtral
from milo.evaluate import divergence
from milo.evaluate.folder import load_model
from milo.evaluate.router import AgreementTally, mean_and_worst


@torch.no_grad()
def choices(model, ids, window=32):
    """Each layer's chosen experts, from the logits that transformers returns: sets by token."""
    passes = [model(w[None], output_router_logits=True).router_logits for w in ids.split(window) if len(w) > 1]
    return [
        [set(row.topk(2).indices.tolist()) for each in layer for row in each] for layer in zip(*passes, strict=True)
    ]


def test_matches_the_routers_logits(model, other, ids):
    routing = divergence(model, other, ids, window=32, batch=3).routing
    mine, theirs = choices(model, ids), choices(other, ids)
    assert [layer.layer for layer in routing] == [f"model.layers.{i}.block_sparse_moe.experts" for i in range(2)]
    for layer, a, b in zip(routing, mine, theirs, strict=True):
        assert layer.tokens == len(a) == 150
        assert layer.top_k == 2
        assert layer.same_set == sum(x == y for x, y in zip(a, b, strict=True)) / 150
        assert layer.overlap == sum(len(x & y) for x, y in zip(a, b, strict=True)) / 300
        assert 0 < layer.same_set < layer.overlap < 1


def test_a_model_agrees_with_its_copy(model, ids):
    routing = divergence(tiny_mixtral(0), model, ids, window=32).routing
    assert [(layer.same_set, layer.overlap) for layer in routing] == [(1, 1), (1, 1)]


def test_no_pass_is_added_and_no_hook_stays(model, other, ids):
    passes = []
    with pytest.MonkeyPatch.context() as patch:
        for each in (model, other):
            forward = each.forward
            patch.setattr(each, "forward", lambda *a, _f=forward, **k: (passes.append(1), _f(*a, **k))[1])
        divergence(model, other, ids[:128], window=32, batch=2)
    assert len(passes) == 2 * 2
    assert not any(module._forward_pre_hooks for each in (model, other) for module in each.modules())


def test_a_compressed_model_is_watched_at_the_same_places(mixtral_folder: Path, compressed_folder: Path):
    compressed, original = (load_model(folder, "float32") for folder in (compressed_folder, mixtral_folder))
    with torch.no_grad():  # what compression alone changes would not tip these untrained routers
        original.get_input_embeddings().weight += 0.02
    ids = torch.arange(3, 63)
    routing = divergence(compressed, original, ids, window=32).routing
    for layer, a, b in zip(routing, choices(compressed, ids), choices(original, ids), strict=True):
        assert layer.same_set == sum(x == y for x, y in zip(a, b, strict=True)) / 60
        assert 0 < layer.same_set < 1


def test_models_without_experts_have_no_routing(ids):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY
    )
    dense = LlamaForCausalLM(config).eval()
    assert divergence(dense, dense, ids, window=32).routing == ()
    assert mean_and_worst(()) is None


@given(st.lists(st.tuples(*[st.permutations(range(6)).map(lambda p: p[:3])] * 2), min_size=1, max_size=20), st.data())
def test_order_within_a_choice_and_cuts_between_passes_change_nothing(pairs, data):
    a, b = (torch.tensor([pair[i] for pair in pairs]) for i in range(2))
    cut = data.draw(st.integers(0, len(pairs)))
    tally = AgreementTally()
    for part in (slice(0, cut), slice(cut, None)):
        tally.add({"l": a[part].flip(1)}, {"l": b[part]})
    [layer] = tally.layers()
    assert layer.same_set == sum(set(x) == set(y) for x, y in pairs) / len(pairs)
    assert layer.overlap == sum(len({*x} & {*y}) for x, y in pairs) / (3 * len(pairs))
