"""`--budget`: the plan of least predicted loss for a number of bytes, made and explained."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from milo.checkpoint.roles import LAYER_INDEX
from milo.cli.console import bar, err, out, say, size
from milo.cli.options import Knobs
from milo.errors import CheckpointError, DeviceError, MiloError, UnsupportedModelError
from milo.integrations.transformers.fisher import sensitivities
from milo.integrations.transformers.streamed import streamed_model
from milo.pipeline.budget import plan_budget
from milo.pipeline.measure_menu import measure_menu
from milo.pipeline.planning import Source
from milo.plan.budget import ROUNDS, Budget, BudgetPlan
from milo.plan.plan import Row
from milo.plan.recipe import DEFAULT
from milo.plan.sensitivity import Sensitivities, structural

BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="Instead of a recipe: 3.4bpw (compressed matrices) or 20GiB (the whole folder)."),
]
SensitivityOption = Annotated[
    str,
    typer.Option(
        "--sensitivity",
        help="How --budget weighs errors. random: gradients of the original, a layer at a time, at random tokens; "
        "structure: names alone.",
    ),
]
SelfOption = Annotated[
    bool,
    typer.Option("--self-calibrate", help="Gradients at tokens the original itself guesses, instead of random ones."),
]
SENSITIVITIES = ("random", "structure")


def plan_by_budget(
    source: Source, budget: str, knobs: Knobs, counts: Path | None, sensitivity: str, self_calibrate: bool, device: str
) -> BudgetPlan:
    """Find the sensitivities, measure the menu, allocate.

    Raises:
        PlanError: no budget, or one that is too small.
        MiloError: options that contradict each other, or an original that cannot be run.
    """
    wanted = Budget.parse(budget)
    _check(knobs, counts, sensitivity)
    origin = "self" if self_calibrate else sensitivity
    groups = source.inventory.candidates
    if origin == "structure":
        known = structural(groups)
    else:
        with bar() as update:
            known = _gradients(source, origin == "self", device, update)
    with bar(sum(group.parameters for group in groups)) as update:
        measured = measure_menu(
            source, known.importance, device=device, progress=lambda done, total, name: update(done, f"menu: {name}")
        )
    return plan_budget(source, wanted, measured, known, origin, knobs.rounds or ROUNDS)


def _check(knobs: Knobs, counts: Path | None, sensitivity: str) -> None:
    if sensitivity not in SENSITIVITIES:
        raise MiloError(f"unknown sensitivity {sensitivity!r}; choose one of {', '.join(SENSITIVITIES)}")
    turned = {name for name, value in vars(knobs).items() if value is not None} - {"recipe", "rounds"}
    if turned or counts is not None or knobs.recipe != DEFAULT:
        if counts is not None:
            turned.add("counts")
        names = ", ".join(sorted("--" + name.replace("_", "-") for name in turned))
        raise MiloError(f"--budget chooses bits, groups and ranks itself; leave out {names or '--recipe'}")


def _gradients(source: Source, own_text: bool, device: str, update: Callable[[float, str], None]) -> Sensitivities:
    """Sensitivities from the original, which passes through memory one layer at a time."""
    remedy = "use --sensitivity structure, which reads names only"
    try:
        with streamed_model(source.checkpoint, device) as model:
            return sensitivities(model, source.inventory, own_text, update)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{error}; to plan without running the model, {remedy}") from error
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{device} has too little memory for a layer and its gradients; {remedy}") from error


def print_allocation(found: BudgetPlan, source: Source, files: int) -> None:
    """What every role got, what it costs, and the price of a byte."""
    plan, allocation = found.plan, found.allocation
    title = f"{source.checkpoint.folder} · budget {plan.policy}"
    table = Table(title=title, title_justify="left")
    for column in ("matrices", "role", "count", "bits/group: layers", "rank (mean)", "bytes", "bits/weight", "loss"):
        left = column in ("matrices", "role", "bits/group: layers")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in plan.rows:
        grouped[LAYER_INDEX.sub("#", row.name, count=1)].append(row)
    for template, rows in grouped.items():
        ranks = [rank for row in rows for rank in row.ranks]
        parameters, nbytes = sum(row.parameters for row in rows), sum(row.nbytes for row in rows)
        loss = sum(found.losses[row.name] for row in rows)
        table.add_row(
            template,
            str(rows[0].role),
            f"{len(ranks):,}",
            _choices(rows),
            f"{sum(ranks) / len(ranks):.1f}" if any(ranks) else "0",
            f"{nbytes:,}",
            f"{8 * nbytes / parameters:.3f}",
            f"{loss / allocation.loss:.1%}" if allocation.loss else "0",
        )
    out.print(table)
    say(
        f"compressed: {plan.parameters:,} weights in {plan.nbytes:,} bytes = {plan.bits_per_weight:.4f} bits a weight; "
        f"files: {files:,} bytes"
    )
    gap = f"within {allocation.gap:.1e} of the best possible" if allocation.gap else "the best possible"
    if plan.policy.endswith("structure sensitivities"):
        say(f"the choice is {gap} under these sensitivities, whose unit is arbitrary")
    else:
        say(f"predicted divergence from the original: {allocation.loss:.4f} nats a token (to second order), {gap}")
    if allocation.price:
        step = plan.nbytes // 100
        say(
            f"the price of a byte: {allocation.price:.3g}; 1 % more of them ({size(step)}) would save about "
            f"{allocation.price * step / allocation.loss:.1%} of the loss"
        )
    else:
        say("the budget buys the best option everywhere", err)


def _choices(rows: list[Row]) -> str:
    """`3/64 ×20  4/32 ×12`: how many layers chose what."""
    counts = Counter((row.encoding.bits, row.encoding.group_size) for row in rows)
    return "  ".join(f"{b}/{g}" + (f" ×{n}" if len(rows) > 1 else "") for (b, g), n in sorted(counts.items()))
