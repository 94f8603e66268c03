"""Tiny task files as LAMBADA's, PIQA's and ARC's authors publish them, and the hub's form of the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LAMBADA = [{"text": text} for text in ("The cat saw the cat", 'He said "go"\n\nand she would go', "a b c d a b c")]
PIQA = [
    {"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0},
    {"goal": "dry  a cup", "sol1": "use water ", "sol2": "use a towel", "label": 1},
    {"goal": "boil an egg", "sol1": "in water", "sol2": "in sand", "label": 0},
]
ARC = [
    {
        "id": "a",
        "question": "What is hot?",
        "choices": {"text": ["ice", "fire", "snow", "rain"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    {
        "id": "b",
        "question": "How many\u2028legs has a dog?",
        "choices": {"text": ["two", "four", "six"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
]
HUB_ROWS = {"lambada_openai": LAMBADA, "piqa": PIQA, "arc_easy": ARC, "arc_challenge": ARC[::-1]}


def write_task_files(folder: Path) -> Path:
    """All four tasks as published, in the subfolders that `--task-dir` looks into."""
    _write(folder / "lambada" / "lambada_test.jsonl", LAMBADA)
    write_piqa(folder / "piqa", "valid")
    _write(folder / "arc" / "ARC-Easy-Test.jsonl", [_arc_as_published(row) for row in ARC])
    _write(folder / "arc" / "ARC-Challenge-Test.jsonl", [_arc_as_published(row) for row in ARC[::-1]])
    return folder


def write_piqa(folder: Path, split: str) -> None:
    _write(folder / f"{split}.jsonl", [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in PIQA])
    (folder / f"{split}-labels.lst").write_text("".join(f"{row['label']}\n" for row in PIQA))


def _arc_as_published(row: dict[str, Any]) -> dict[str, Any]:
    choices = [{"text": t, "label": k} for t, k in zip(row["choices"]["text"], row["choices"]["label"], strict=True)]
    return {"id": row["id"], "question": {"stem": row["question"], "choices": choices}, "answerKey": row["answerKey"]}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def letters() -> PreTrainedTokenizerFast:
    """One token a character: every text has tokens, and no two texts the same ones."""
    characters = ["[EOS]", "[UNK]", "\n", "\u2028", *map(chr, range(32, 123))]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[EOS]", unk_token="[UNK]", pad_token="[EOS]")
