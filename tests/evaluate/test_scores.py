"""Paired standard errors against their definition and against resampling."""

from __future__ import annotations

import math

import pytest
import torch

from milo.evaluate.scores import paired_stderr, read_scores


def results(metric: str, value: float, samples: list[float]) -> tuple[dict, dict]:
    """What `simple_evaluate` returns for one task, and what was loaded."""
    rows = [{"doc_id": i, "filter": "none", metric: score} for i, score in enumerate(samples)]
    found = {
        "results": {"t": {"alias": "t", f"{metric},none": value, f"{metric}_stderr,none": "N/A"}},
        "n-shot": {"t": 0},
        "n-samples": {"t": {"effective": len(samples)}},
        "higher_is_better": {"t": {metric: True}},
        "samples": {"t": rows[::-1]},
    }
    return found, {"tasks": {"t": None}, "groups": {}, "group_map": {}}


def test_a_mean_over_documents_is_paired_by_document() -> None:
    one, other = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    [a], [b] = (read_scores(*results("acc", sum(x) / 4, x)) for x in (one, other))
    assert a.stderr is None
    assert a.influence.tolist() == one
    differences = torch.tensor([0.0, -1.0, 1.0, 0.0]).double()
    assert paired_stderr(a.influence, b.influence) == pytest.approx(differences.std().item() / 2)


def test_a_perplexity_is_paired_as_resampling_the_documents_does() -> None:
    draw = torch.Generator().manual_seed(0)
    one = -3 + torch.randn(400, generator=draw).double()
    other = one - 0.05 + 0.1 * torch.randn(400, generator=draw).double()
    scores = [read_scores(*results("perplexity", math.exp(-x.mean()), x.tolist()))[0] for x in (one, other)]
    picks = torch.randint(400, (2000, 400), generator=draw)
    resampled = (-one[picks].mean(1)).exp() - (-other[picks].mean(1)).exp()
    linear = paired_stderr(scores[0].influence, scores[1].influence)
    assert linear == pytest.approx(resampled.std().item(), rel=0.1)


def test_other_aggregations_have_no_paired_error() -> None:
    [median] = read_scores(*results("odd", 0.7, [0.1, 0.7, 0.9]))
    assert median.influence is None
    assert paired_stderr(median.influence, median.influence) is None
