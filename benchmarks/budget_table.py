"""Print the committed budget results as the Markdown tables of `docs/results.md`.

python benchmarks/budget_table.py benchmarks/results/budget_*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADER = (
    "| recipe | bits/weight | matrices, bytes | folder, bytes | KL, WikiText-2 | perplexity | KL, LAMBADA | against | "
    "KL ratio, WikiText-2 | standard errors below | KL ratio, LAMBADA |"
)


def line(row: dict[str, Any]) -> str:
    """One recipe."""
    wiki, lambada = row["wikitext2"], row["lambada"]
    name = f"budget, {row['sensitivities']}" if "sensitivities" in row else row["recipe"]
    cells = [
        name,
        f"{row['bits_per_weight']:.3f}",
        f"{row['compressed_bytes']:,}",
        f"{row['folder_bytes']:,}",
        f"{wiki['kl']:.5f} ± {wiki['kl_se']:.5f}",
        f"{wiki['ppl_increase']:+.2%}",
        f"{lambada['kl']:.5f} ± {lambada['kl_se']:.5f}",
    ]
    if "against" in row:
        errors = -wiki["kl_minus"] / wiki["kl_minus_se"]
        cells += [row["against"], f"{wiki['kl_ratio']:.3f}", f"{errors:.1f}", f"{lambada['kl_ratio']:.3f}"]
    else:
        cells += ["–"] * 4
    return "| " + " | ".join(cells) + " |"


def table(result: dict[str, Any]) -> str:
    """One model's rows."""
    tokens = result["tokens"]
    head = (
        f"### {result['model']}\n\n{tokens['wikitext2']:,} tokens of WikiText-2's test split, "
        f"{tokens['lambada']:,} of LAMBADA; {result['device']}; sensitivities {result['seconds']['random']:.0f} s, "
        f"menu {result['seconds']['menu, random']:.0f} s.\n"
    )
    return "\n".join([head, HEADER, "|---" * (HEADER.count("|") - 1) + "|", *map(line, result["rows"])])


def main() -> None:
    print("\n\n".join(table(json.loads(Path(name).read_text())) for name in sys.argv[1:]))


if __name__ == "__main__":
    main()
