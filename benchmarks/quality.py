"""Quality against bytes: compress a model with several recipes, judge each on a text.

    python benchmarks/quality.py MODEL --text FILE --window 512 --out benchmarks/results/quality_NAME.json

One JSON per model: device, versions, and per recipe exact bytes, perplexity (both protocols), KL divergence from the
original with its standard error, seconds. `docs/results.md` quotes the committed files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import header, write

from milo.evaluate import divergence, load_text, perplexity, tokenize
from milo.evaluate.folder import load_model, load_tokenizer, measure_size
from milo.integrations.transformers.source import open_source
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.planning import plan_source
from milo.plan.recipe import custom_recipe

# Label, preset, rank policy (None: the preset's).
RECIPES = (
    ("rtn", "rtn", None),
    ("hqq", "hqq", None),
    ("milo h/16", "milo-s1", "dense:h/16+kurtosis:h/512"),
    ("milo-s1", "milo-s1", None),
    ("milo-s2", "milo-s2", None),
)


def judge(folder: Path, original: Any, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexities, and the divergence unless `folder` is the original itself."""
    size = measure_size(folder)
    model = load_model(folder, "float32", args.device) if size.bits_per_weight else original
    side = perplexity(model, ids, window=args.window, batch=args.batch)
    slide = perplexity(model, ids, window=args.window, stride=args.window // 4, batch=args.batch)
    row: dict[str, Any] = {
        "compressed_bytes": size.compressed_bytes,
        "bits_per_weight": size.bits_per_weight,
        "tensor_bytes": size.tensor_bytes,
        "folder_bytes": size.folder_bytes,
        "ppl": side.ppl,
        "ppl_sliding": slide.ppl,
        "tokens": side.tokens,
    }
    if model is not original:
        found = divergence(model, original, ids, window=args.window, batch=args.batch)
        row |= {"kl": found.kl, "kl_se": found.kl_se, "kl_p99": found.kl_p99, "top1": found.top1}
    if args.long_window:
        row["ppl_long"] = perplexity(model, ids, window=args.long_window, batch=max(1, args.batch // 4)).ppl
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--long-window", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    text, text_name = load_text(args.text)
    ids = tokenize(load_tokenizer(Path(args.model)), text, args.max_tokens)
    original = load_model(Path(args.model), "float32", args.device)
    settings = {
        "model": Path(args.model).name,
        "text": text_name,
        "window": args.window,
        "stride": args.window // 4,
        "long_window": args.long_window or None,
        "dtype": "float32",
    }
    rows: list[dict[str, Any]] = [{"recipe": "original (bf16)", **judge(Path(args.model), original, ids, args)}]
    for label, preset, ranks in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            source = open_source(args.model)
            recipe = custom_recipe(preset, source.checkpoint.config, ranks=ranks)
            start = time.perf_counter()
            plan = plan_source(source, recipe)
            planned = time.perf_counter() - start
            done = compress_checkpoint(source.checkpoint, source.inventory, plan, folder, devices=args.device)
            errors = [matrix["error"] for matrix in done.report["matrices"]]
            row = {"recipe": label, "policy": plan.policy, "plan_s": planned, "solve_s": done.seconds}
            row |= {"mean_error": sum(errors) / len(errors), "plan_bytes": plan.nbytes}
            row |= judge(Path(folder), original, ids, args)
        rows.append(row)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    write(args.out, header(args.device, settings, "torch", "transformers") | {"rows": rows})


if __name__ == "__main__":
    main()
