"""LAMBADA, PIQA and ARC from their files as published, for machines without a network.

lm-eval's own definitions (prompts, targets, metrics) are taken from the installed package as they are; only where the
documents come from is replaced, by reading the files that the data sets' authors publish into the columns that
lm-eval's definitions name. Nothing is downloaded, cached or looked up.

| task | files, in FOLDER or in its subfolder named so |
|---|---|
| `lambada_openai` | `lambada/lambada_test.jsonl` |
| `piqa` | `piqa/valid.jsonl`, `valid-labels.lst`; for few-shot also `train.jsonl`, `train-labels.lst` |
| `arc_easy` | `arc/ARC-Easy-Test.jsonl`; for few-shot also `ARC-Easy-Train.jsonl` |
| `arc_challenge` | `arc/ARC-Challenge-Test.jsonl`; likewise `ARC-Challenge-Train.jsonl` |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milo.errors import MiloError

if TYPE_CHECKING:
    from datasets import Dataset

Document = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """Where a task's documents lie and how they are read.

    Attributes:
        subfolder: also the folder of lm-eval's definition.
        splits: split in lm-eval's definition to the published file (PIQA: its stem, of two files).
        read: `(folder, file)` to the documents.
        judged: the split that is judged; the others serve few-shot prompts and may be missing.
    """

    subfolder: str
    splits: dict[str, str]
    read: Callable[[Path, str], list[Document]]
    judged: str


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise MiloError(f"cannot read the task file {path}: {error}") from error
    return lines[:-1] if lines[-1] == "" else lines


def _json_lines(path: Path) -> list[Document]:
    try:
        documents = [json.loads(line) for line in _lines(path)]
    except ValueError as error:
        raise MiloError(f"{path} is not one JSON object a line: {error}") from error
    if not documents:
        raise MiloError(f"the task file {path} is empty")
    return documents


def _lambada(folder: Path, file: str) -> list[Document]:
    return [{"text": row["text"]} for row in _json_lines(folder / file)]


def _piqa(folder: Path, file: str) -> list[Document]:
    rows = _json_lines(folder / f"{file}.jsonl")
    labels = _lines(folder / f"{file}-labels.lst")
    if len(rows) != len(labels):
        raise MiloError(f"{folder}/{file}.jsonl has {len(rows)} lines, but {file}-labels.lst has {len(labels)}")
    return [
        {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": int(label)}
        for row, label in zip(rows, labels, strict=True)
    ]


def _arc(folder: Path, file: str) -> list[Document]:
    return [
        {
            "id": row["id"],
            "question": row["question"]["stem"],
            "choices": {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")},
            "answerKey": row["answerKey"],
        }
        for row in _json_lines(folder / file)
    ]


def _arc_task(kind: str) -> LocalTask:
    names = {"train": "Train", "validation": "Dev", "test": "Test"}
    return LocalTask("arc", {split: f"ARC-{kind}-{name}.jsonl" for split, name in names.items()}, _arc, "test")


LOCAL_TASKS = {
    "lambada_openai": LocalTask("lambada", {"test": "lambada_test.jsonl"}, _lambada, "test"),
    "piqa": LocalTask("piqa", {"train": "train", "validation": "valid"}, _piqa, "validation"),
    "arc_easy": _arc_task("Easy"),
    "arc_challenge": _arc_task("Challenge"),
}


def local_definitions(names: list[str], folder: Path, num_fewshot: int | None) -> list[dict[str, Any]]:
    """Overrides for lm-eval's own definitions that make them read local files.

    Args:
        names: of `LOCAL_TASKS`.
        folder: `--task-dir`.
        num_fewshot: examples before each document; None is 0 for these tasks.

    Returns:
        Members of an lm-eval group, each overriding `custom_dataset` and, with None, the splits that have no file.

    Raises:
        MiloError: a task without local form, or a file is missing or not as published.
    """
    if not folder.is_dir():
        raise MiloError(f"--task-dir {folder} is not a folder")
    members = []
    for name in names:
        if name not in LOCAL_TASKS:
            raise MiloError(
                f"{name} cannot be read from local files; with --task-dir there are {', '.join(LOCAL_TASKS)}"
            )
        task = LOCAL_TASKS[name]
        present = {split: found for split, file in task.splits.items() if (found := _find(folder, task, file))}
        if task.judged not in present:
            file = _first_file(task, task.splits[task.judged])
            raise MiloError(f"{name} needs {file} in {folder} or {folder / task.subfolder}")
        if num_fewshot and "train" in task.splits and "train" not in present:
            file = _first_file(task, task.splits["train"])
            raise MiloError(f"few-shot {name} draws its examples from {file}, which is not in {folder}")
        keys = {"train": "training_split", "validation": "validation_split"}
        absent = {keys[split]: None for split in task.splits if split not in present}
        members.append({"task": name, "custom_dataset": partial(_dataset, name, present), **absent})
    return members


def _first_file(task: LocalTask, file: str) -> str:
    return file if file.endswith(".jsonl") else f"{file}.jsonl"


def _find(folder: Path, task: LocalTask, file: str) -> Path | None:
    """The folder, of the two that are looked into, which has the file."""
    return next((f for f in (folder / task.subfolder, folder) if (f / _first_file(task, file)).is_file()), None)


def _dataset(name: str, present: dict[str, Path], **_: Any) -> dict[str, Dataset]:
    """What lm-eval calls in place of `datasets.load_dataset`; it passes the definition's metadata along."""
    from datasets import Dataset

    task = LOCAL_TASKS[name]
    splits = {}
    for split, folder in present.items():
        file = task.splits[split]
        try:
            splits[split] = Dataset.from_list(task.read(folder, file))
        except (KeyError, TypeError) as error:
            raise MiloError(f"{folder / _first_file(task, file)} is not as published: {error!r}") from error
    return splits
