"""Perplexity against the definitions, written out token by token in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from judged import tiny_mixtral
from milo.errors import MiloError
from milo.evaluate import load_text, perplexity, tokenize

SHARED = Path(__file__).resolve().parents[3] / "shared"
MIXTRAL_29M = SHARED / "models" / "mixtral-29m"
WIKITEXT = SHARED / "data" / "wikitext2" / "wiki.test.hf_join.txt"


@torch.no_grad()
def nlls(model, window_ids):
    """Float64 NLL of every token of a window but the first: ``[L - 1]``."""
    log_p = model(input_ids=window_ids[None]).logits[0].double().log_softmax(-1)
    return -log_p[:-1].gather(1, window_ids[1:, None])[:, 0]


def sliding_by_definition(model, ids, window, stride):
    """The recipe of the paper's script and of Hugging Face's guide, with its -100 masking made explicit."""
    means, tokens, previous_end = [], 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        target_length = end - previous_end
        labels = ids[begin:end].clone()
        labels[:-target_length] = -100
        scored = nlls(model, ids[begin:end])[labels[1:] != -100]
        means.append(scored.mean().item())
        tokens += len(scored)
        previous_end = end
        if end == len(ids):
            break
    return sum(means) / len(means), tokens


@pytest.mark.parametrize("length", [150, 128, 20, 2, 129])
@pytest.mark.parametrize("batch", [1, 3])
def test_non_overlapping_is_the_token_weighted_mean_of_each_window_alone(model, ids, length, batch):
    row = ids[:length]
    every = torch.cat([nlls(model, w) for w in row.split(32)])
    result = perplexity(model, row, window=32, batch=batch)
    assert result.tokens == len(every)
    assert result.nll == pytest.approx(every.mean().item(), rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(every.mean().item()), rel=1e-5)
    assert (result.window, result.stride) == (32, 32)


@pytest.mark.parametrize(("window", "stride"), [(32, 8), (32, 31), (32, 1), (50, 20), (64, 16)])
@pytest.mark.parametrize("length", [150, 33, 40, 12])
def test_sliding_is_the_unweighted_mean_of_window_means(model, ids, window, stride, length):
    nll, tokens = sliding_by_definition(model, ids[:length], window, stride)
    result = perplexity(model, ids[:length], window=window, stride=stride)
    assert result.tokens == tokens == length - 1
    assert result.nll == pytest.approx(nll, rel=1e-6)


def test_a_stride_of_one_window_is_the_non_overlapping_protocol(model, ids):
    assert perplexity(model, ids, window=32, stride=32) == perplexity(model, ids, window=32)


def test_bfloat16_logits_are_upcast(model, ids):
    half = tiny_mixtral(0).to(torch.bfloat16)
    every = torch.cat([nlls(half, w) for w in ids.split(32)])
    assert perplexity(half, ids, window=32).nll == pytest.approx(every.mean().item(), rel=1e-5)


def test_small_chunks_change_nothing(model, ids, monkeypatch):
    whole = perplexity(model, ids, window=32)
    monkeypatch.setattr("milo.evaluate.windows._CHUNK_ELEMENTS", 300)
    assert perplexity(model, ids, window=32).nll == pytest.approx(whole.nll, rel=1e-7)


def test_progress_ends_at_one_and_the_training_flag_comes_back(model, ids):
    seen: list[float] = []
    training = tiny_mixtral(0).train()
    perplexity(training, ids, window=32, batch=2, progress=lambda fraction, _: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert training.training
    assert all(p.grad is None for p in training.parameters())


def test_overflow_is_infinite_and_not_an_exception(ids):
    hopeless = tiny_mixtral(0)
    hopeless.lm_head.weight.data *= 1e4
    assert perplexity(hopeless, ids, window=32).ppl == math.inf


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"window": 65}, MiloError, "64 positions"),
        ({"ids": torch.tensor([3])}, MiloError, "too short"),
        ({"ids": torch.tensor([], dtype=torch.int64)}, MiloError, "too short"),
        ({"ids": torch.tensor([1, 97])}, MiloError, "another model"),
        ({"ids": torch.tensor([-1, 9])}, MiloError, "another model"),
        ({"ids": torch.zeros(1, 9, dtype=torch.int64)}, ValueError, "integer row"),
        ({"ids": torch.zeros(9)}, ValueError, "integer row"),
        ({"window": 1}, ValueError, "at least 2"),
        ({"stride": 33}, ValueError, "stride"),
        ({"stride": 0}, ValueError, "stride"),
        ({"batch": 0}, ValueError, "batch"),
    ],
)
def test_bad_input_is_named(model, ids, change, error, says):
    with pytest.raises(error, match=says):
        perplexity(model, **{"ids": ids, "window": 32, **change})


def test_a_window_beyond_the_positions_is_fine_for_a_text_within_them(model, ids):
    assert perplexity(model, ids[:40], window=2048).tokens == 39


@pytest.mark.slow
@pytest.mark.skipif(not (MIXTRAL_29M.exists() and WIKITEXT.exists()), reason="needs the shared model and text")
def test_a_real_model_on_wikitext():
    model = AutoModelForCausalLM.from_pretrained(MIXTRAL_29M, dtype=torch.float32)
    text, name = load_text(WIKITEXT)
    row = tokenize(AutoTokenizer.from_pretrained(MIXTRAL_29M), text, max_tokens=20_000)
    assert name == WIKITEXT.name
    assert len(row) == 20_000
    result = perplexity(model, row, window=512)
    assert result.tokens == 20_000 - 40
    assert result.ppl == pytest.approx(117.3, rel=0.01)
