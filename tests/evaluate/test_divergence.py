"""Divergence against its definition in float64, and its properties."""

from __future__ import annotations

import math

import pytest
import torch

from judged import tiny_mixtral
from milo.errors import MiloError
from milo.evaluate import divergence


@torch.no_grad()
def kls(model, original, window_ids):
    """Float64 KL(original ‖ model) at every position of a window but the last: ``[L - 1]``."""
    log_q = model(input_ids=window_ids[None]).logits[0, :-1].double().log_softmax(-1)
    log_p = original(input_ids=window_ids[None]).logits[0, :-1].double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), (log_p.argmax(-1) == log_q.argmax(-1))


def test_a_model_does_not_diverge_from_itself(model, ids):
    result = divergence(model, model, ids, window=32)
    assert result.kl <= 1e-6
    assert result.kl_p99 <= 1e-6
    assert result.top1 == 1.0


@pytest.mark.parametrize("length", [150, 128, 129])
@pytest.mark.parametrize("batch", [1, 3])
def test_matches_the_definition(model, other, ids, length, batch):
    parts = [kls(model, other, w) for w in ids[:length].split(32) if len(w) > 1]
    every = torch.cat([kl for kl, _ in parts])
    result = divergence(model, other, ids[:length], window=32, batch=batch)
    assert result.tokens == len(every)
    assert result.kl == pytest.approx(every.mean().item(), rel=1e-5)
    for q, mine in ((0.5, result.kl_p50), (0.9, result.kl_p90), (0.99, result.kl_p99)):
        assert mine == pytest.approx(every.quantile(q, interpolation="nearest").item(), rel=1e-5)
    assert result.top1 == pytest.approx(torch.cat([same for _, same in parts]).double().mean().item())


def test_the_order_of_the_models_matters(model, other, ids):
    assert divergence(model, other, ids, window=32).kl != divergence(other, model, ids, window=32).kl


def test_standard_error_is_that_of_the_window_means(model, other, ids):
    means = torch.stack([kls(model, other, w)[0].mean() for w in ids[:128].split(32)])
    result = divergence(model, other, ids[:128], window=32)
    assert result.kl_se == pytest.approx((means.std() / math.sqrt(len(means))).item(), rel=1e-4)


def test_one_window_has_no_standard_error(model, other, ids):
    assert math.isnan(divergence(model, other, ids[:20], window=32).kl_se)


def test_rounding_to_bfloat16_diverges_a_little(model, ids):
    result = divergence(tiny_mixtral(0).to(torch.bfloat16), model, ids, window=32)
    assert 0 < result.kl < 0.05
    assert 0 <= result.kl_p50 <= result.kl_p90 <= result.kl_p99


def test_different_vocabularies_are_refused(model, ids):
    with pytest.raises(MiloError, match="vocabularies differ: 128 and 97"):
        divergence(tiny_mixtral(0, vocab_size=128), model, ids, window=32)


def test_the_original_also_limits_the_window(model, ids):
    with pytest.raises(MiloError, match="16 positions"):
        divergence(model, tiny_mixtral(0, max_position_embeddings=16), ids, window=32)
