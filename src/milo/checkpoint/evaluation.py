"""What a folder's saved evaluation (`milo_eval.json`) says of tasks, as text for whoever shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TaskRow = tuple[str, str, str, str]


def task_rows(evaluation: Mapping[str, Any]) -> list[TaskRow]:
    """Scores of the tasks that were asked for; the parts of a group stay in the file.

    Args:
        evaluation: the file's content. Rows that are no task's are left out, since a later version may write others.

    Returns:
        Task and metric, this model's score, the original's, and their difference, each ± its standard error; a dash
        for what was not measured.
    """
    tasks = evaluation.get("tasks")
    results = tasks.get("results") if isinstance(tasks, Mapping) else None
    return [
        (
            f"{row['task']}, {row['metric']}",
            _with_error(row.get("value"), row.get("stderr")),
            _with_error(row.get("original"), row.get("original_stderr")),
            _with_error(row.get("difference"), row.get("difference_stderr")),
        )
        for row in results or ()
        if _flat(row) and row.get("part_of") is None and "task" in row and "metric" in row
    ]


def _flat(row: Any) -> bool:
    return isinstance(row, Mapping) and not any(isinstance(value, Mapping | list) for value in row.values())


def _with_error(value: Any, error: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, int | float) else f"{value:.4f}"
