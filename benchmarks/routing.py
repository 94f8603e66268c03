"""What perplexity hides: routers, first choices and the tail of KL, for a model's compressions by several recipes.

    python benchmarks/routing.py MODEL --text FILE --max-tokens 51200 --out benchmarks/results/routing_NAME.json

One JSON per model: per recipe the divergence from the original with every layer's router agreement. `docs/results.md`
quotes the committed files.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import header, write
from tasks import compressed

from milo.evaluate import divergence, load_text, tokenize
from milo.evaluate.folder import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    text, text_name = load_text(args.text)
    ids = tokenize(load_tokenizer(Path(args.model)), text, args.max_tokens)
    original = load_model(Path(args.model), "float32", args.device)
    rows: list[dict[str, Any]] = []
    for recipe, folder in compressed(args.model, args.device):
        model = load_model(folder, "float32", args.device)
        found = divergence(model, original, ids, window=args.window, batch=args.batch)
        rows.append({"recipe": recipe, **asdict(found)})
        print(recipe, found.top1, [round(layer.same_set, 4) for layer in found.routing], flush=True)
    settings = {"model": Path(args.model).name, "text": text_name, "dtype": "float32"}
    write(args.out, header(args.device, settings, "torch", "transformers") | {"rows": rows})


if __name__ == "__main__":
    main()
