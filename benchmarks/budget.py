"""The allocator against everything it must beat, at equal bytes counted from the files.

    python benchmarks/budget.py MODEL --text wiki.test.hf_join.txt --lambada lambada_test.jsonl --out FILE.json

HQQ, MiLo with dense rank hidden/4 and expert rank 16 (10 rounds), every uniform choice of the menu, the role-only rule
(dense roles at 5 or 6 bits, experts the rest), and budgets of the same bytes. Rows are written as they come; every
budget row names what it stands against, with the paired difference of the divergences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import device_name

import milo
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
from milo.plan.sensitivity import structural

MILO = "milo h/4 + 16"
FIVE, SIX = Encoding(5, 64, 6, 8), Encoding(6, 64, 6, 8)


def fixed_plans(source: Source) -> dict[str, Plan]:
    """What the budget must beat."""
    config = source.checkpoint.config
    plans = {
        MILO: plan_source(source, custom_recipe("hqq", config, ranks="dense:h/4+sparse:16", rounds=10)),
        "hqq": plan_source(source, custom_recipe("hqq", config)),
    }
    blank = plan_source(source, custom_recipe("hqq", config, grid=GRID))
    for dense in (FIVE, SIX):
        for experts in MENU[:2]:
            rows = tuple(replace(row, encoding=dense if row.role.dense else experts) for row in blank.rows)
            name = f"dense {dense.bits}/{dense.group_size}, experts {experts.bits}/{experts.group_size}"
            plans[name] = replace(blank, rows=rows, recipe=name)
    for encoding in MENU[1:4]:  # the first is the least there is: nothing to allocate
        name = f"uniform {encoding.bits}/{encoding.group_size}"
        plans[name] = replace(blank, rows=tuple(replace(row, encoding=encoding) for row in blank.rows), recipe=name)
    return plans


class Bench:
    """Compresses plans and judges the folders on every text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, open_source(args.model)
        folder = Path(args.model)
        self.model = load_model(folder, "float32", args.device)
        tokenizer = load_tokenizer(folder)
        wiki = tokenize(tokenizer, load_text(args.text)[0], args.tokens)
        lines = args.lambada.read_text(encoding="utf-8").splitlines()
        passages = "\n\n".join(json.loads(line)["text"] for line in lines)
        texts = {"wikitext2": wiki, "lambada": tokenize(tokenizer, passages, args.lambada_tokens)}
        self.references = {name: Reference(self.model, ids, args.window, batch=16) for name, ids in texts.items()}
        self.scores: dict[str, dict[str, Scores]] = {}
        self.result: dict[str, Any] = {
            "model": folder.name,
            "window": args.window,
            "tokens": {name: len(ids) for name, ids in texts.items()},
            "dtype": "float32",
            "device": device_name(args.device),
            "milo": milo.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "original": {name: {"ppl": r.original.perplexity} for name, r in self.references.items()},
            "rows": [],
        }

    def judge(self, label: str, plan: Plan, against: str | None = None, **more: Any) -> dict[str, Any]:
        """Compress, count, compare, write."""
        with tempfile.TemporaryDirectory() as out:
            begin = time.perf_counter()
            compress_checkpoint(self.source.checkpoint, self.source.inventory, plan, out, devices=self.args.device)
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
        self.result["rows"].append(row)
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print(
            json.dumps({k: row[k] for k in ("recipe", "bits_per_weight", "against", "wikitext2") if k in row}),
            flush=True,
        )
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lambada", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--lambada-tokens", type=int, default=20_480)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)

    bench = Bench(args)
    source = bench.source
    groups = source.inventory.groups
    begin = time.perf_counter()
    measured = measure_menu(source, device=args.device)
    bench.result["menu_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    known = {"random": sensitivities(bench.model, source.inventory)}
    bench.result["sensitivities_s"] = time.perf_counter() - begin
    known["self"] = sensitivities(bench.model, source.inventory, own_text=True)
    known["structure"] = structural(groups)
    bench.result["sensitivities"] = known
    weights = sum(group.parameters for group in groups)

    def budget(origin: str, rate: float, against: str) -> None:
        found = plan_budget(source, Budget(f"{rate:.4f}bpw", rate=rate), measured, known[origin], origin)
        label = f"budget {rate:.4f} ({origin}) against {against}"
        bench.judge(label, found.plan, against, sensitivities=origin, predicted_kl=found.allocation.loss)

    plans = fixed_plans(source)
    rates = {label: 8 * plan.nbytes / weights for label, plan in plans.items()}

    def fixed(*labels: str) -> None:
        for label in labels:
            bench.judge(label, plans[label])

    def against(label: str) -> None:
        fixed(label)
        budget("random", rates[label], label)

    fixed(MILO, "hqq")
    for rate, label in ((rates[MILO], MILO), (rates["hqq"], "hqq"), (0.86 * rates[MILO], MILO)):
        budget("random", rate, label)
    against("dense 5/64, experts 3/32")
    against("uniform 3/32")
    for origin in ("structure", "self"):
        budget(origin, rates[MILO], MILO)
    against("uniform 4/64")
    budget("structure", rates["dense 5/64, experts 3/32"], "dense 5/64, experts 3/32")
    for label in ("dense 5/64, experts 3/64", "dense 6/64, experts 3/32", "dense 6/64, experts 3/64", "uniform 4/32"):
        against(label)


if __name__ == "__main__":
    main()
