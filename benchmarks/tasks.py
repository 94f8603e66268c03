"""Tasks from local files: a model and its compressions by several recipes on LAMBADA, PIQA and ARC.

    python benchmarks/tasks.py MODEL --task-dir FOLDER --out benchmarks/results/tasks_NAME.json

One JSON per model: per recipe every metric of lm-eval with its standard error, and the difference from the original
with its paired standard error. `docs/results.md` quotes the committed files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import header, write

from milo.evaluate.folder import load_model, load_tokenizer
from milo.evaluate.scores import Score, compare, read_scores
from milo.evaluate.suite import task_names
from milo.evaluate.tasks import Tasks, load_tasks, run_tasks
from milo.integrations.transformers.source import open_source
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.planning import plan_source
from milo.plan.recipe import custom_recipe

RECIPES = ("rtn", "hqq", "milo-s1", "milo-s2")


def compressed(model: str, device: str) -> Iterator[tuple[str, Path]]:
    """Each recipe's name and its compressed folder, one at a time."""
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            source = open_source(model)
            plan = plan_source(source, custom_recipe(name, source.checkpoint.config))
            compress_checkpoint(source.checkpoint, source.inventory, plan, folder, devices=device)
            yield name, Path(folder)


def judge(folder: Path, tasks: Tasks, args: argparse.Namespace) -> list[Score]:
    model = load_model(folder, args.dtype, args.device)
    results = run_tasks(model, load_tokenizer(folder), tasks, limit=args.limit, batch=args.batch)
    return read_scores(results, tasks.loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--task-dir", type=Path, required=True)
    parser.add_argument("--tasks", default="lambada,piqa,arc")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    tasks = load_tasks(task_names(args.tasks), args.task_dir)
    started = time.perf_counter()
    originals = judge(Path(args.model), tasks, args)
    rows: list[dict[str, Any]] = [{"recipe": "original (bf16)", "seconds": time.perf_counter() - started}]
    rows[0]["results"] = [asdict(row) for row in compare(originals, None)]
    for recipe, folder in compressed(args.model, args.device):
        started = time.perf_counter()
        found = compare(judge(folder, tasks, args), originals)
        results = [asdict(row) for row in found]
        rows.append({"recipe": recipe, "seconds": time.perf_counter() - started, "results": results})
        print(recipe, {f"{row.task} {row.metric}": round(row.value, 4) for row in found}, flush=True)
    settings = {"model": Path(args.model).name, "limit": args.limit, "batch": args.batch, "dtype": args.dtype}
    write(args.out, header(args.device, settings, "lm_eval", "torch", "transformers") | {"rows": rows})


if __name__ == "__main__":
    main()
