"""Print the committed quality results as the Markdown tables of `docs/results.md`.

python benchmarks/quality_table.py benchmarks/results/quality_*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADER = (
    "| recipe | bits/weight | matrices, bytes | all tensors, bytes | perplexity | sliding | KL from the original | "
    "KL p99 | same first choice | mean error |"
)


def table(result: dict[str, Any]) -> str:
    """One model's rows."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for row in result["rows"]:
        compressed = row["bits_per_weight"] is not None
        cells = [
            row["recipe"],
            f"{row['bits_per_weight']:.3f}" if compressed else "16",
            f"{row['compressed_bytes']:,}" if compressed else "–",
            f"{row['tensor_bytes']:,}",
            f"{row['ppl']:.2f}",
            f"{row['ppl_sliding']:.2f}",
            f"{row['kl']:.4f} ± {row['kl_se']:.4f}" if compressed else "–",
            f"{row['kl_p99']:.3f}" if compressed else "–",
            f"{row['top1']:.1%}" if compressed else "–",
            f"{row['mean_error']:.4f}" if compressed else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text())
        print(f"### {result['model']}\n\n{table(result)}\n")


if __name__ == "__main__":
    main()
