"""The allocator against everything it must beat, at equal bytes counted from the files.

    python benchmarks/budget.py MODEL... --text wiki.test.hf_join.txt --lambada lambada_test.jsonl --out FOLDER

HQQ, MiLo with dense rank hidden/4 and expert rank 16 (10 rounds), every uniform choice of the menu, the role-only rule
(dense roles at 5 or 6 bits, experts the rest), and budgets of the same bytes. Uniform choices and the role-only rule
have the allocator's own grids, in-feature weights included, so that allocation is all they differ in. One
`budget_NAME.json` a model; rows are written as they come, the ones that matter most first, and a file that is there
already is gone on with. Every budget row names what it stands against, with the paired difference of the divergences.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from record import header, write

from milo.evaluate import load_text, tokenize
from milo.evaluate.folder import load_model, load_tokenizer, measure_size
from milo.evaluate.paired import Reference, Scores, kl_difference
from milo.format.matrix import Encoding
from milo.integrations.transformers.fisher import sensitivities
from milo.integrations.transformers.source import open_source
from milo.pipeline.budget import plan_budget
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.measure_menu import measure_menu
from milo.pipeline.planning import Source, plan_source
from milo.plan.budget import GRID, Budget
from milo.plan.menu import MENU
from milo.plan.plan import Plan
from milo.plan.recipe import custom_recipe
from milo.plan.sensitivity import Sensitivities, structural

T = TypeVar("T")
MILO, HQQ = "milo h/4 + 16", "hqq"
PAPER = (MILO, HQQ)  # with the paper's grids; all others have the allocator's
FIVE, SIX = Encoding(5, 64, 6, 8), Encoding(6, 64, 6, 8)


def fixed_plans(source: Source) -> dict[str, Plan]:
    """What the budget must beat."""
    config = source.checkpoint.config
    plans = {
        MILO: plan_source(source, custom_recipe("hqq", config, ranks="dense:h/4+sparse:16", rounds=10)),
        HQQ: plan_source(source, custom_recipe("hqq", config)),
    }
    blank = plan_source(source, custom_recipe("hqq", config, grid=GRID))
    for dense in (FIVE, SIX):
        for experts in MENU[:3]:
            rows = tuple(replace(row, encoding=dense if row.role.dense else experts) for row in blank.rows)
            name = f"dense {dense.bits}/{dense.group_size}, experts {experts.bits}/{experts.group_size}"
            plans[name] = replace(blank, rows=rows, recipe=name)
    for encoding in MENU[1:-1]:  # the first is the least there is and the last the most: nothing to allocate
        name = f"uniform {encoding.bits}/{encoding.group_size}"
        plans[name] = replace(blank, rows=tuple(replace(row, encoding=encoding) for row in blank.rows), recipe=name)
    return plans


class Bench:
    """Compresses plans and judges the folders on every text."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.args, self.source = args, open_source(str(folder))
        self.out = args.out / f"budget_{folder.name}.json"
        self.model = load_model(folder, "float32", args.device)
        tokenizer = load_tokenizer(folder)
        wiki = tokenize(tokenizer, load_text(args.text)[0], args.tokens)
        lines = args.lambada.read_text(encoding="utf-8").splitlines()
        passages = "\n\n".join(json.loads(line)["text"] for line in lines)
        texts = {"wikitext2": wiki, "lambada": tokenize(tokenizer, passages, args.lambada_tokens)}
        self.references = {
            name: Reference(self.model, ids, args.window, batch=16, held=args.device) for name, ids in texts.items()
        }
        self.scores: dict[str, dict[str, Scores]] = {}
        settings = {
            "model": folder.name,
            "window": args.window,
            "tokens": {name: len(ids) for name, ids in texts.items()},
            "dtype": "float32",
        }
        self.result: dict[str, Any] = {
            **header(args.device, settings, "torch", "transformers"),
            "original": {name: {"ppl": r.original.perplexity} for name, r in self.references.items()},
            "rows": [],
        }
        if self.out.exists():
            self._go_on(json.loads(self.out.read_text()))

    def _go_on(self, found: dict[str, Any]) -> None:
        """Take over the rows of an earlier run of the same settings."""
        for key, value in self.result.items():
            if key not in ("rows", "original") and found[key] != value:
                raise SystemExit(f"{self.out} is of another run ({key} {found[key]}, here {value}): move it away")
        self.result["rows"] = found["rows"]

    def has(self, label: str) -> bool:
        """Whether a row is there from an earlier run, or from this one."""
        return any(row["recipe"] == label for row in self.result["rows"])

    def judge(
        self, label: str, plan: Plan, known: Sensitivities | None = None, against: str | None = None, **more: Any
    ) -> None:
        """Compress, count, compare, write."""
        with tempfile.TemporaryDirectory() as out:
            begin = time.perf_counter()
            compress_checkpoint(
                self.source.checkpoint,
                self.source.inventory,
                plan,
                out,
                importance=known.importance if known else None,
                devices=self.args.device,
            )
            seconds = time.perf_counter() - begin
            size = measure_size(Path(out))
            assert size.compressed_bytes == plan.nbytes
            packed = load_model(Path(out), "float32", self.args.device)
            self.scores[label] = {name: r.score(packed) for name, r in self.references.items()}
        row: dict[str, Any] = {
            "recipe": label,
            "compressed_bytes": size.compressed_bytes,
            "bits_per_weight": size.bits_per_weight,
            "folder_bytes": size.folder_bytes,
            "solve_s": seconds,
            **more,
        }
        for name, score in self.scores[label].items():
            original = self.references[name].original.perplexity
            row[name] = {"kl": score.mean_kl, "kl_se": score.kl_se, "ppl": score.perplexity}
            row[name]["ppl_increase"] = score.perplexity / original - 1
            if against:
                other = self.scores[against][name]
                difference, error = kl_difference(score, other)
                row[name] |= {"kl_ratio": score.mean_kl / other.mean_kl, "kl_minus": difference, "kl_minus_se": error}
        if against:
            row["against"] = against
        rows = {each["recipe"]: each for each in self.result["rows"]} | {label: row}
        self.result["rows"] = list(rows.values())
        write(self.out, self.result)
        print(
            json.dumps({k: row[k] for k in ("recipe", "bits_per_weight", "against", "wikitext2") if k in row}),
            flush=True,
        )


def run(folder: Path, args: argparse.Namespace) -> None:
    """All rows of one model."""
    bench = Bench(folder, args)
    source = bench.source
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        begin = time.perf_counter()
        found = work()
        seconds[name] = round(time.perf_counter() - begin, 1)
        return found

    known = {
        "random": timed("random", lambda: sensitivities(bench.model, source.inventory)),
        "self": timed("self", lambda: sensitivities(bench.model, source.inventory, own_text=True)),
        "structure": structural(source.inventory.candidates),
    }
    measured = {
        origin: timed(f"menu, {origin}", partial(measure_menu, source, found.importance, device=args.device))
        for origin, found in known.items()
    }
    bench.result["seconds"] = seconds
    bench.result["sensitivities"] = {origin: found.costs for origin, found in known.items()}
    plans = fixed_plans(source)
    weights = sum(group.parameters for group in source.inventory.groups)
    rates = {label: 8 * plan.nbytes / weights for label, plan in plans.items()}

    def budget(origin: str, against: str, share: float = 1.0) -> None:
        rate = share * rates[against]
        label = f"budget {rate:.4f} ({origin}) against {against}"
        if bench.has(label) or not re.search(args.only, against):
            return
        if against not in bench.scores:  # the paired difference needs every token's divergence, which no file has
            bench.judge(against, plans[against], known["random"] if against not in PAPER else None)
        found = plan_budget(source, Budget(f"{rate:.4f}bpw", rate=rate), measured[origin], known[origin], origin)
        loss = found.allocation.loss
        bench.judge(label, found.plan, known[origin], against, sensitivities=origin, predicted_kl=loss)

    for origin in known:
        budget(origin, MILO)
    budget("random", HQQ)
    budget("random", MILO, 0.86)
    for label in plans:
        if label not in PAPER:
            budget("random", label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lambada", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--lambada-tokens", type=int, default=20_480)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="regular expression: no others are stood against")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in args.models:
        begin = time.perf_counter()
        run(folder, args)
        print(f"{folder.name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
