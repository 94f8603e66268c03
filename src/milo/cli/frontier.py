"""`milo frontier`: what a model's bytes buy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from milo.checkpoint.writer import write_atomically
from milo.cli.budget import SelfOption
from milo.cli.console import bar, err, out, say
from milo.cli.options import BEST_DEVICE, DeviceOption, ModelArgument
from milo.errors import MiloError, PlanError
from milo.evaluate.folder import load_model, load_tokenizer, measure_size
from milo.evaluate.frontier import Point, draw_frontier
from milo.evaluate.paired import Reference
from milo.evaluate.text import load_text, tokenize
from milo.integrations.transformers.fisher import sensitivities
from milo.integrations.transformers.source import open_source
from milo.pipeline.budget import plan_budget
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.measure_menu import measure_menu
from milo.pipeline.planning import Source, plan_source
from milo.plan.budget import Budget
from milo.plan.plan import Plan
from milo.plan.recipe import PRESETS, preset

BUDGETS = "3.3bpw,3.4bpw,3.6bpw,3.8bpw,4.1bpw,4.5bpw"


def frontier(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where frontier.json and frontier.png go.")],
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = BUDGETS,
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 text; WikiText-2 by default.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Judge on the first tokens only.")] = 100_000,
    self_calibrate: SelfOption = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the compressed folders, under models/ of the output.")
    ] = False,
    device: DeviceOption = BEST_DEVICE,
) -> None:
    """Compress MODEL with every recipe and at several budgets; draw quality against bytes."""
    wanted = [Budget.parse(part) for part in budgets.split(",")]
    source = open_source(model)
    content, name = load_text(text)
    folder = source.checkpoint.folder
    ids = tokenize(load_tokenizer(folder), content, max_tokens)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiloError(f"cannot write to {output}: {error}") from error
    original = load_model(folder, "float32", device)
    plans: dict[str, Plan] = {
        recipe: plan_source(source, preset(recipe, source.checkpoint.config)) for recipe in PRESETS
    }
    origin = "self" if self_calibrate else "random"
    with bar() as update:
        known = sensitivities(original, source.inventory, self_calibrate, update)
    with bar(sum(group.parameters for group in source.inventory.candidates)) as update:
        measured = measure_menu(
            source, known.importance, device=device, progress=lambda done, total, group: update(done, f"menu: {group}")
        )
    for budget in wanted:
        try:
            plans[budget.text] = plan_budget(source, budget, measured, known, origin).plan
        except PlanError as error:  # too small for this model's narrow rows: the other points still stand
            say(f"{budget.text} is left out: {error}", err)
    with bar() as update:
        reference = Reference(
            original, ids, window, progress=lambda done, message: update(done, f"original: {message}")
        )
    points = [
        _point(source, label, plan, {} if label in PRESETS else known.importance, reference, output, device, keep)
        for label, plan in plans.items()
    ]
    with suppress(OSError):  # not empty: something was kept, now or earlier
        (output / "models").rmdir()
    title = f"{folder.name} · {name}, {len(ids):,} tokens in windows of {window}"
    result: dict[str, Any] = {
        "model": folder.name,
        "text": name,
        "tokens": len(ids),
        "window": window,
        "dtype": "float32",
        "sensitivities": origin,
        "original_perplexity": reference.original.perplexity,
        "points": [asdict(point) for point in points],
    }
    write_atomically(output / "frontier.json", json.dumps(result, indent=1) + "\n")
    draw_frontier(points, reference.original.perplexity, output / "frontier.png", title)
    out.print(_table(points, title))
    say(f"{output / 'frontier.json'}, {output / 'frontier.png'}")


def _point(
    source: Source,
    label: str,
    plan: Plan,
    importance: Mapping[str, torch.Tensor],
    reference: Reference,
    output: Path,
    device: str,
    keep: bool,
) -> Point:
    """Compress, count, judge."""
    folder = output / "models" / label
    with bar(plan.parameters) as update:
        done = compress_checkpoint(
            source.checkpoint,
            source.inventory,
            plan,
            folder,
            importance=importance,
            devices=device,
            overwrite=True,
            progress=lambda done, total, name: update(done, f"{label}: {name}"),
        )
    size = measure_size(folder)
    model = load_model(folder, "float32", device)
    with bar() as update:
        scores = reference.score(model, lambda done, message: update(done, f"{label}: {message}"))
    if not keep:
        shutil.rmtree(folder)
    return Point(
        recipe=label,
        budget=label not in PRESETS,
        compressed_bytes=size.compressed_bytes,
        bits_per_weight=size.bits_per_weight or 16.0,
        folder_bytes=size.folder_bytes,
        kl=scores.mean_kl,
        kl_se=scores.kl_se,
        perplexity=scores.perplexity,
        seconds=round(done.seconds, 2),
    )


def _table(points: list[Point], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("recipe", "bits/weight", "matrices, bytes", "folder, bytes", "KL from the original", "perplexity"):
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for point in points:
        table.add_row(
            point.recipe,
            f"{point.bits_per_weight:.3f}",
            f"{point.compressed_bytes:,}",
            f"{point.folder_bytes:,}",
            f"{point.kl:.4f} ± {point.kl_se:.4f}",
            f"{point.perplexity:.3f}",
        )
    return table
