"""Paired scores: the same numbers as the unpaired functions, and a sharper difference."""

from __future__ import annotations

import pytest
import torch

import zoo
from milo.evaluate import divergence, perplexity
from milo.evaluate.paired import Reference, Scores, kl_difference


def noisy(seed: int, size: float) -> torch.nn.Module:
    model = zoo.tiny_model("mixtral").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator) * parameter.data.std()
    return model


def test_scores_agree_with_divergence_and_perplexity() -> None:
    original, model = zoo.tiny_model("mixtral").eval(), noisy(0, 0.1)
    ids = torch.randint(8, 120, (150,), generator=torch.Generator().manual_seed(0))
    reference = Reference(original, ids, window=32, batch=2)
    scores = reference.score(model)
    expected = divergence(model, original, ids, window=32)
    assert scores.mean_kl == pytest.approx(expected.kl, rel=1e-4)
    assert scores.kl_se == pytest.approx(expected.kl_se, rel=1e-3)
    assert scores.perplexity == pytest.approx(perplexity(model, ids, window=32).ppl, rel=1e-5)
    assert reference.original.perplexity == pytest.approx(perplexity(original, ids, window=32).ppl, rel=1e-5)
    assert reference.original.mean_kl == 0
    assert reference.score(original).mean_kl == pytest.approx(0, abs=1e-6)


def test_the_difference_of_equals_is_nothing_and_pairing_sharpens() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(50, generator=generator, dtype=torch.float64)
    tokens = torch.full((50,), 31.0, dtype=torch.float64)
    first = Scores(hard, hard, tokens)
    second = Scores(0.9 * hard, hard, tokens)
    assert kl_difference(first, first) == (0.0, 0.0)
    difference, error = kl_difference(first, second)
    assert difference == pytest.approx(0.1 * hard.mean().item())
    assert error == pytest.approx(0.1 * hard.std().item() / 50**0.5)
    assert error < 0.2 * first.kl_se
