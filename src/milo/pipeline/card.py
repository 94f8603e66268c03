"""The model card of a compressed folder: what it is, what it cost, and how to load it without surprises.

The metadata block is huggingface_hub's own (`ModelCardData`), so that a hub reads it as its makers meant it: the
base model and that this is a quantisation of it, the source's licence, and what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError  # PyYAML comes with huggingface_hub

from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.evaluation import task_rows
from milo.checkpoint.writer import EVALUATION, explained, write_atomically

CARD = "README.md"
# What the source's card says of the weights themselves stays true of compressed ones.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Stands in every card we write; a card without it was edited by hand and is left alone.
GENERATED = "<!-- written by MiLo, and rewritten by `milo eval --save`; remove this line to keep your edits -->"


def model_card(
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    base_model: str | None,
    inherited: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """`README.md` with the metadata block that model hubs read.

    Args:
        config: the output's `config.json`.
        report: the compression report.
        base_model: name of the source; a local path is described but not linked.
        inherited: metadata of the source's card (see `inherited_metadata`).
        evaluation: what `milo eval --save` kept, if anything was measured.
    """
    source = base_model or "a model in memory"
    name = source.rstrip("/").rsplit("/", 1)[-1]
    plan = config["quantization_config"]["plan"]
    bits = " and ".join(map(str, sorted({entry["bits"] for entry in plan["matrices"]})))
    results = _eval_results(evaluation or {})
    metadata = ModelCardData(
        base_model=base_model if _is_hub_name(base_model) else None,
        base_model_relation="quantized" if _is_hub_name(base_model) else None,
        library_name="transformers",
        tags=["milo", "quantized", "mixture-of-experts"],
        model_name=f"{name}-{report['recipe']}" if results else None,
        eval_results=results or None,
        **{"pipeline_tag": "text-generation", **(inherited or {})},
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n{GENERATED}",
        f"# {name}, compressed with MiLo",
        f"Made from `{source}` with the recipe `{report['recipe']}` (rank policy `{report['policy']}`, "
        f"{plan['rounds']} rounds at most), without calibration data: codes of {bits} bits, and a low-rank compensator "
        "for every matrix that the policy gives a rank.",
        *([f"```bash\n{report['command']}\n```"] if report.get("command") else []),
        _LOADING,
        _holdings(report),
        *([_quality(evaluation)] if evaluation else []),
        "`milo inspect THIS_FOLDER` shows bits, rank and error by role, `milo report THIS_FOLDER` draws them, and "
        "`milo_report.json` lists every matrix.",
    ]
    return "\n\n".join(sections) + "\n"


def inherited_metadata(folder: Path) -> dict[str, Any]:
    """What a card in this folder says that stays true after compression; nothing without a readable card."""
    path = folder / CARD
    if not path.exists():
        return {}
    try:
        found = metadata_load(path) or {}
    except (ValueError, OSError, YAMLError):  # somebody else's card: its mistakes are no reason to refuse the weights
        return {}
    return {key: found[key] for key in _INHERITED if found.get(key)}


def save_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Keep an evaluation beside the weights, and show it in the card unless that was edited by hand.

    Args:
        folder: a compressed folder.
        evaluation: `Evaluation.to_json()`.

    Raises:
        CheckpointError: not a whole compressed folder, or not writable.
    """
    checkpoint = CompressedCheckpoint(folder)
    with explained(folder):
        write_atomically(folder / EVALUATION, json.dumps(evaluation, indent=1))
        card = folder / CARD
        if not checkpoint.has_report or (card.exists() and GENERATED not in card.read_text(encoding="utf-8")):
            return
        inherited = inherited_metadata(folder)
        text = model_card(checkpoint.config, checkpoint.report, checkpoint.base_model, inherited, evaluation)
        write_atomically(card, text)


def _is_hub_name(base_model: str | None) -> bool:
    return base_model is not None and base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """What fits the hub's scheme of task, data set and metric: perplexity, and the divergence from the original."""
    text = evaluation.get("text")
    wanted = (
        ("contiguous", "ppl", "perplexity", "perplexity, windows side by side"),
        ("divergence", "kl", "kl_divergence", "KL divergence from the original, nats a token"),
    )
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=text,
            metric_type=metric,
            metric_name=name,
            metric_value=found[value],
            metric_args={"window": found.get("window")},
        )
        for key, value, metric, name in wanted
        if text and value in (found := evaluation.get(key) or {})
    ]


_LOADING = """## Load it

```python
import milo  # first: without it transformers fills the experts with random numbers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

`pip install milo-moe` provides `milo`. Loading without it does not fail: transformers only warns of an unknown \
`quant_method` and then initialises the compressed matrices randomly.

vLLM: not yet; nothing teaches it this `quant_method` so far."""


def _holdings(report: Mapping[str, Any]) -> str:
    errors = [m["error"] for m in report["matrices"]]
    return "\n".join(
        [
            "## What it holds",
            "",
            "| | |",
            "|---|---|",
            f"| compressed weights | {report['compressed_weights']:,} |",
            f"| their bytes | {report['compressed_bytes']:,} ({report['bits_per_weight']:.3f} bits a weight) |",
            f"| all tensor files | {report['files_bytes']:,} bytes |",
            f"| mean relative error of a matrix | {sum(errors) / len(errors):.4f} |",
        ]
    )


def _quality(evaluation: Mapping[str, Any]) -> str:
    blocks = ["## Measured quality", "By `milo eval --save`."]
    if rows := _on_text(evaluation):
        blocks.append("\n".join([f"| on {evaluation.get('text')} | |", "|---|---|", *rows]))
    if rows := [f"| {' | '.join(cells)} |" for cells in task_rows(evaluation)]:
        head = "| task, metric | this model | original | difference (paired standard error) |"
        blocks.append("\n".join([head, "|---|---|---|---|", *rows]))
    return "\n\n".join(blocks)


def _on_text(evaluation: Mapping[str, Any]) -> list[str]:
    rows = []
    for key, how in (("contiguous", "side by side"), ("sliding", "sliding")):
        if found := evaluation.get(key):
            step = f" by {found['stride']}" if key == "sliding" else ""
            rows.append(f"| perplexity, windows of {found['window']} {how}{step} | {found['ppl']:.4f} |")
    if found := evaluation.get("divergence"):
        rows.append(f"| KL divergence from the original, nats a token | {found['kl']:.5f} ± {found['kl_se']:.5f} |")
        rows.append(f"| same first choice as the original | {found['top1']:.2%} |")
    if found := evaluation.get("contiguous"):
        rows.append(f"| tokens scored | {found['tokens']:,} |")
    return rows
