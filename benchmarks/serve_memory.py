"""Memory of published models once they are compressed, and the GPUs they fit: the table of `docs/serving.md`.

    python benchmarks/serve_memory.py [--recipe milo-s2] [--models mixtral-8x7b ...]

Nothing is measured. Bytes are the planner's own, exact for what lies on disk (`milo.integrations.serving.weights`).
Where a recipe looks at weights, which are not here, their kurtosis comes from `kurtosis.py`. The
cache's room is what is left of vLLM's share of a card, divided by the bytes a token takes.
"""

from __future__ import annotations

import argparse
from math import prod
from typing import Any

from kurtosis import made_up_kurtosis
from published import PARAMETERS, config_of, heads_of

from milo.integrations.serving import UTILISATION, cache_bytes, weights
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import PRESETS, preset

CARDS = {"RTX 4090": 24_564, "L40S": 46_068, "H100": 81_559, "H200": 143_771}  # MiB, as nvidia-smi shows them
WORKING = 3.0  # GiB beside weights and cache: activations of a full batch, CUDA graphs, the context; an assumption


def rows_of(name: str, recipe: str) -> dict[str, Any]:
    """Exact bytes of one model, and what each card has left."""
    config = config_of(name)
    heads, inventory = heads_of(config)
    plan = make_plan(inventory, preset(recipe, config), config, Evidence(made_up_kurtosis))
    found = weights(plan, heads, config)
    a_token = cache_bytes(config)
    assert a_token is not None
    fits = {}
    for card, memory in CARDS.items():
        for gpus in (1, 2, 4, 8):
            left = UTILISATION * memory / 2**10 - found.total / gpus / 2**30 - WORKING
            if left > 0:
                shared = "kv_lora_rank" in config  # a latent is one for all heads, so every GPU keeps all of it
                fits[card] = (gpus, int(left * 2**30 * (1 if shared else gpus) / a_token))
                break
    return {
        "model": name,
        "parameters": sum(prod(head.shape) for head in heads),
        "bits": plan.bits_per_weight,
        "compressed": found.compressed,
        "other": found.other,
        "token": a_token,
        "fits": fits,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: bytes, and for each card how many of them are needed and how many tokens their cache holds."""
    header = ["model", "bf16, GiB", "MiLo, GiB", "not compressed of it", "bits/weight", "cache a token, KiB", *CARDS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [
            row["model"],
            f"{2 * row['parameters'] / 2**30:.1f}",
            f"{(row['compressed'] + row['other']) / 2**30:.2f}",
            f"{row['other'] / 2**30:.2f}",
            f"{row['bits']:.3f}",
            f"{row['token'] / 2**10:.1f}",
        ]
        for card in CARDS:
            gpus, tokens = row["fits"].get(card, (0, 0))
            cells.append(f"{gpus} × · {tokens // 1000:,}k" if gpus else "more than 8")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=PRESETS, default="milo-s1")
    parser.add_argument("--models", nargs="+", choices=list(PARAMETERS), default=list(PARAMETERS))
    options = parser.parse_args()
    print(table([rows_of(name, options.recipe) for name in options.models]))


if __name__ == "__main__":
    main()
