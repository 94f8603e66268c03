r"""What lm-eval reports, as one row a metric, and the comparison of two models over the same documents.

**Paired standard errors.** Both models answer the same documents, so the error of their difference is far below what
their two separate standard errors suggest: most documents are answered alike and contribute nothing. With :math:`a_i`
and :math:`b_i` the models' scores on document :math:`i`, it is the standard deviation of :math:`a_i - b_i` over
:math:`\sqrt n`. LAMBADA's perplexity :math:`\exp(-\bar\ell)` is treated alike after linearising it (the delta method):
document :math:`i` counts as :math:`-\mathrm{ppl}\,\ell_i`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from milo.evaluate.suite import reported_by_paper


@dataclass(frozen=True)
class Score:
    """One metric of one task for one model.

    Attributes:
        task: lm-eval's name of the task or group.
        part_of: the group it is a part of; None for what was asked for itself.
        metric: lm-eval's name of the metric.
        filter: lm-eval's name of the answer filter; `none` for most tasks.
        shots: examples before each document.
        documents: documents judged.
        higher_is_better: None where a group's tasks disagree.
        value: the metric.
        stderr: its standard error by lm-eval; None where it has none.
        influence: float64 `[documents]`, in the documents' order: how each moves `value`, up to a constant; None for
            metrics that are neither a mean over documents nor a perplexity.
    """

    task: str
    part_of: str | None
    metric: str
    filter: str
    shots: int
    documents: int
    higher_is_better: bool | None
    value: float
    stderr: float | None
    influence: torch.Tensor | None = field(repr=False, compare=False)


@dataclass(frozen=True)
class TaskResult:
    """A `Score` of a model beside that of its original; without an original the last four are None.

    Attributes:
        in_paper: whether the paper's tables have this figure.
        difference: `value - original`.
        difference_stderr: paired standard error of the difference; None where it is unknown.
    """

    task: str
    part_of: str | None
    metric: str
    filter: str
    shots: int
    documents: int
    higher_is_better: bool | None
    value: float
    stderr: float | None
    in_paper: bool
    original: float | None = None
    original_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


@dataclass(frozen=True)
class TaskEvaluation:
    """A model on tasks, beside its original.

    Attributes:
        model: folder or hub name, as given.
        original: likewise; None if there was none to compare with.
        source: where the documents came from.
        limit: documents of each task judged at most; None for all.
        batch: documents run together.
        lm_eval: version of lm-eval.
        results: one row a metric; `part_of` is None for the tasks that were asked for.
    """

    model: str
    original: str | None
    source: str
    limit: int | None
    batch: int
    lm_eval: str
    results: list[TaskResult]


def read_scores(results: Mapping[str, Any], loaded: Mapping[str, Any]) -> list[Score]:
    """Every metric of every task in what `lm_eval.simple_evaluate` returned.

    Args:
        results: its result, with samples.
        loaded: the `TaskManager.load` that it ran.

    Returns:
        Tasks in the order of `loaded`; a group is followed by its parts.
    """
    parts = {child for children in loaded["group_map"].values() for child in children}
    top = [name for name in (*loaded["groups"], *loaded["tasks"]) if name not in parts]
    return [score for name in top for score in _read(name, None, results, loaded)]


def compare(scores: list[Score], originals: list[Score] | None) -> list[TaskResult]:
    """Puts a model's scores beside its original's, both over the same documents."""
    others = {_key(score): score for score in originals or []}
    rows = []
    for score in scores:
        fields = {name: value for name, value in vars(score).items() if name != "influence"}
        fields["in_paper"] = reported_by_paper(score.task, score.metric, score.filter)
        other = others.get(_key(score))
        if other is not None:
            fields |= {
                "original": other.value,
                "original_stderr": other.stderr,
                "difference": score.value - other.value,
                "difference_stderr": paired_stderr(score.influence, other.influence),
            }
        rows.append(TaskResult(**fields))
    return rows


def paired_stderr(one: torch.Tensor | None, other: torch.Tensor | None) -> float | None:
    """Standard error of the difference of two means over the same documents, float64 `[documents]` each."""
    if one is None or other is None or len(one) != len(other) or len(one) < 2:
        return None
    return (one - other).std().item() / math.sqrt(len(one))


def _key(score: Score) -> tuple[str, str, str]:
    return score.task, score.metric, score.filter


def _read(name: str, part_of: str | None, results: Mapping[str, Any], loaded: Mapping[str, Any]) -> Iterator[Score]:
    leaves = leaf_tasks(name, loaded)
    metrics = {**results["results"], **results.get("groups", {})}.get(name, {})
    for label, value in metrics.items():
        metric, comma, answer_filter = label.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = metrics.get(f"{metric}_stderr,{answer_filter}")
        yield Score(
            task=name,
            part_of=part_of,
            metric=metric,
            filter=answer_filter,
            shots=results["n-shot"][leaves[0]],
            documents=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
            higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,  # lm-eval writes "N/A" for none
            influence=_influence(metric, answer_filter, float(value), leaves, results, loaded),
        )
    for child in loaded["group_map"].get(name, ()):
        yield from _read(child, name, results, loaded)


def leaf_tasks(name: str, loaded: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, its groups' included; a task is its own."""
    children = loaded["group_map"].get(name)
    return [name] if children is None else [leaf for child in children for leaf in leaf_tasks(child, loaded)]


def _influence(
    metric: str,
    answer_filter: str,
    value: float,
    leaves: list[str],
    results: Mapping[str, Any],
    loaded: Mapping[str, Any],
) -> torch.Tensor | None:
    """See `Score.influence`. Aggregations are told by their result, not by name: the mean, or the perplexity, of the
    documents' scores must give lm-eval's own figure."""
    samples = [
        sample[metric]
        for leaf in leaves
        for sample in sorted(results["samples"][leaf], key=lambda sample: sample["doc_id"])
        if sample["filter"] == answer_filter and metric in sample
    ]
    if not samples or not all(isinstance(each, (bool, int, float)) for each in samples):
        return None
    scores = torch.tensor(samples, dtype=torch.float64)
    mean = scores.mean().item()
    if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
        return scores
    if mean < 0 and math.isclose(math.exp(-mean), value, rel_tol=1e-9):
        return -value * scores
    return None
