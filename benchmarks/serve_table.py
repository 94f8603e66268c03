"""Print the results of `serve.py` as the Markdown tables of `docs/serving.md`.

python benchmarks/serve_table.py benchmarks/results/serve_h100.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

NAMES = {"ours": "MiLo INT3", "bf16": "bf16", "int4": "INT4 (Marlin)", "humming3": "INT3 (Humming)"}
NAMES["int4-humming"] = "INT4 (Humming)"
COMPRESSED = ("attention", "experts", "shared experts", "dense FFN")  # roles that a plan covers
Row = Mapping[str, Any]


def speed_table(rows: Sequence[Row]) -> str:
    """Milliseconds a step and tokens a second by system, with how many times faster `ours` is than each."""
    ours = next((row for row in rows if row["system"] == "ours"), None)
    batches = [each["batch"] for each in rows[0]["decode"]]
    prompts = [each["tokens"] for each in rows[0]["prefill"]]
    header = ["system", *(f"batch {n}" for n in batches), *(f"prompt {n:,}" for n in prompts)]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        cells = [NAMES[row["system"]]]
        for kind, unit, digits in (("decode", "ms", 2), ("prefill", "tokens_per_s", 0)):
            for position, each in enumerate(row[kind]):
                text = f"{each[unit]:,.{digits}f}"
                if ours is not None and row is not ours:
                    mine = ours[kind][position][unit]
                    text += f" ({each[unit] / mine if unit == 'ms' else mine / each[unit]:.2f}×)"
                cells.append(text)
        lines.append(_line(cells))
    return "\n".join(lines)


def memory_table(rows: Sequence[Row]) -> str:
    """GiB by role; for `ours` the compressed roles beside what the plan promised."""
    roles = list(dict.fromkeys(role for row in rows for role in row["memory"]["weights"]))
    header = ["system", *roles, "all weights", "plan", "held ÷ plan", "cache", "rest of PyTorch's"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        memory = row["memory"]
        held = memory["weights"]
        plan, found = row["promised"].get("compressed"), sum(held.get(role, 0) for role in COMPRESSED)
        total = sum(held.values())
        cells = [NAMES[row["system"]], *(_gib(held.get(role, 0)) for role in roles), _gib(total)]
        cells += [_gib(plan), f"{found / plan:.4f}"] if plan else ["–", "–"]
        cells += [_gib(memory["cache"]), _gib(memory["allocated"] - total - memory["cache"])]
        lines.append(_line(cells))
    return "\n".join(lines)


def tables(rows: Iterable[Row]) -> str:
    """Both tables of every shape, number of layers and device."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["shape"], row["layers"], row["device"]

    parts = []
    for (shape, layers, device), group in groupby(sorted(rows, key=key), key=key):
        found = sorted(group, key=lambda row: list(NAMES).index(row["system"]))
        about = f"{shape}, {layers} layers, {device}, vLLM {found[0]['vllm']}, {found[0]['attention']}"
        parts += [f"### {about}", speed_table(found), memory_table(found)]
    return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.3f}"


def main() -> None:
    for name in sys.argv[1:]:
        print(tables(json.loads(Path(name).read_text())["rows"]) + "\n")


if __name__ == "__main__":
    main()
