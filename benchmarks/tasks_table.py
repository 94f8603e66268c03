"""Print the committed task and routing results as the Markdown tables of `docs/results.md`.

    python benchmarks/tasks_table.py benchmarks/results/tasks_*.json
    python benchmarks/tasks_table.py benchmarks/results/routing_*.json

Tasks: an original's cell is its figure ± lm-eval's standard error; a recipe's is its figure and, in brackets, the
difference from the original ± the paired standard error, in bold where it exceeds two of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    ("lambada_openai", "perplexity", "LAMBADA perplexity", "{:.0f}", "{:+.0f}"),
    ("lambada_openai", "acc", "LAMBADA acc", "{:.3f}", "{:+.3f}"),
    ("piqa", "acc", "PIQA acc", "{:.3f}", "{:+.3f}"),
    ("arc_easy", "acc", "ARC-easy acc", "{:.3f}", "{:+.3f}"),
    ("arc_challenge", "acc_norm", "ARC-challenge acc_norm", "{:.3f}", "{:+.3f}"),
)


def tasks_table(result: dict[str, Any]) -> str:
    """One model's recipes on tasks."""
    lines = [_line("recipe", *(title for _, _, title, _, _ in COLUMNS)), "|---" * (len(COLUMNS) + 1) + "|"]
    for row in result["rows"]:
        found = {(each["task"], each["metric"]): each for each in row["results"]}
        cells = [_task_cell(found[task, metric], form, signed) for task, metric, _, form, signed in COLUMNS]
        lines.append(_line(row["recipe"], *cells))
    return "\n".join(lines)


def _task_cell(each: dict[str, Any], form: str, signed: str) -> str:
    if each["difference"] is None:
        return f"{form.format(each['value'])} ± {form.format(each['stderr'])}"
    change = f"{signed.format(each['difference'])} ± {form.format(each['difference_stderr'])}"
    if abs(each["difference"]) > 2 * each["difference_stderr"]:
        change = f"**{change}**"
    return f"{form.format(each['value'])} ({change})"


def routing_table(result: dict[str, Any]) -> str:
    """One model's recipes: agreement with the original, layer by layer."""
    layers = [layer["layer"] for layer in result["rows"][0]["routing"]]
    short = [f"layer {next(part for part in name.split('.') if part.isdigit())}" for name in layers]
    head = (
        "recipe",
        "same first choice",
        "KL p50 / p90 / p99",
        *(f"same experts, {name}" for name in short),
        "overlap",
    )
    lines = [_line(*head), "|---" * len(head) + "|"]
    for row in result["rows"]:
        kl = " / ".join(f"{row[f'kl_p{q}']:.3f}" for q in (50, 90, 99))
        same = [f"{layer['same_set']:.1%}" for layer in row["routing"]]
        overlap = sum(layer["overlap"] for layer in row["routing"]) / len(layers)
        lines.append(_line(row["recipe"], f"{row['top1']:.1%}", kl, *same, f"{overlap:.1%}"))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text())
        table = routing_table if "routing" in result["rows"][0] else tasks_table
        print(f"### {result['model']}\n\n{table(result)}\n")


if __name__ == "__main__":
    main()
