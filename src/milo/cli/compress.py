"""`milo plan`, `milo profile` and `milo quantize`."""

from __future__ import annotations

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from milo.checkpoint.hub import find_model
from milo.checkpoint.roles import LAYER_INDEX
from milo.checkpoint.writer import write_atomically
from milo.cli.budget import BudgetOption, SelfOption, SensitivityOption, plan_by_budget, print_allocation
from milo.cli.console import bar, err, out, print_json, say, size
from milo.cli.options import (
    BitsOption,
    CountsOption,
    DeviceOption,
    DevicesOption,
    FactorOption,
    GridOption,
    GroupOption,
    JsonOption,
    Knobs,
    ModelArgument,
    NoPredictOption,
    RanksOption,
    RecipeOption,
    RoundsOption,
    ScaleOption,
    WorkersOption,
    ZeroOption,
    read_counts,
)
from milo.errors import MiloError
from milo.evaluate.folder import load_model, load_tokenizer
from milo.evaluate.text import load_text, tokenize
from milo.integrations.transformers.routing import routing_counts
from milo.integrations.transformers.source import open_source
from milo.pipeline.compress import check_destination, compress_checkpoint
from milo.pipeline.devices import open_pool, visible_devices
from milo.pipeline.layout import MAX_SHARD_SIZE, lay_out_checkpoint
from milo.pipeline.planning import Source, peak_bytes, plan_source
from milo.pipeline.predict import Prediction, predict
from milo.plan.plan import Plan, Row
from milo.plan.recipe import DEFAULT, Recipe


def plan(
    model: ModelArgument,
    recipe: RecipeOption = DEFAULT,
    ranks: RanksOption = None,
    bits: BitsOption = None,
    group_size: GroupOption = None,
    grid: GridOption = None,
    rounds: RoundsOption = None,
    factor: FactorOption = None,
    scale_bits: ScaleOption = None,
    zero_bits: ZeroOption = None,
    counts: CountsOption = None,
    budget: BudgetOption = None,
    sensitivity: SensitivityOption = "random",
    self_calibrate: SelfOption = False,
    devices: DevicesOption = None,
    workers: WorkersOption = None,
    no_predict: NoPredictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a recipe or budget would do, group by group with exact bytes, and what it takes; compresses nothing."""
    knobs = Knobs(recipe, ranks, bits, group_size, grid, rounds, factor, scale_bits, zero_bits)
    source = open_source(model)
    where, found = visible_devices(devices), None
    if budget is not None:
        found = plan_by_budget(source, budget, knobs, counts, sensitivity, self_calibrate, where[0])
        made = found.plan
    else:
        made = _make_plan(source, knobs.for_model(source.checkpoint.config), counts)
    files = sum(shard.nbytes for shard in lay_out_checkpoint(source.checkpoint, source.inventory, made))
    told = predict(source.checkpoint, made, where, workers) if not no_predict else None
    if as_json:
        print_json(
            {
                **made.to_json(),
                "compressed_weights": made.parameters,
                "compressed_bytes": made.nbytes,
                "bits_per_weight": made.bits_per_weight,
                "sixteen_bit_bytes": source.sixteen_bit_bytes,
                "files_bytes": files,
                "peak_bytes": peak_bytes(made, where[0], workers),
                "devices": list(where),
                "prediction": told.to_json() if told else None,
                **({"allocation": asdict(found.allocation), "losses": dict(found.losses)} if found else {}),
            }
        )
        return
    if found is not None:
        print_allocation(found, source, files)
    else:
        _print_plan(made, source, files)
    if told is None:
        need = size(peak_bytes(made, where[0], workers))
        say(f"peak memory while compressing: about {need} beside Python and PyTorch")
    else:
        say(f"on this machine: {_promise(told, where)}")


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Output folder.")],
    recipe: RecipeOption = DEFAULT,
    ranks: RanksOption = None,
    bits: BitsOption = None,
    group_size: GroupOption = None,
    grid: GridOption = None,
    rounds: RoundsOption = None,
    factor: FactorOption = None,
    scale_bits: ScaleOption = None,
    zero_bits: ZeroOption = None,
    counts: CountsOption = None,
    budget: BudgetOption = None,
    sensitivity: SensitivityOption = "random",
    self_calibrate: SelfOption = False,
    devices: DevicesOption = None,
    workers: WorkersOption = None,
    ray: Annotated[bool, typer.Option("--ray", help="Solve on a Ray cluster that shares both folders' disk.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Bytes a shard, e.g. 5GB or 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an unfinished run away.")] = False,
    no_predict: NoPredictOption = False,
) -> None:
    """Compress MODEL into a folder that transformers loads; no calibration data. The same command again resumes it."""
    knobs = Knobs(recipe, ranks, bits, group_size, grid, rounds, factor, scale_bits, zero_bits)
    source = open_source(model)
    check_destination(source.checkpoint, output, overwrite)
    where = visible_devices(devices)
    importance: Mapping[str, torch.Tensor] = {}
    with closing(open_pool(where, workers, ray)) as pool:  # its processes start while the plan is made
        if budget is not None:
            found = plan_by_budget(source, budget, knobs, counts, sensitivity, self_calibrate, where[0])
            made, importance = found.plan, found.importance
        else:
            made = _make_plan(source, knobs.for_model(source.checkpoint.config), counts)
        say(
            f"{made.parameters:,} weights in {len(made.rows):,} groups, {size(made.nbytes)} "
            f"({made.bits_per_weight:.3f} bits a weight)",
            err,
        )
        told = predict(source.checkpoint, made, where, workers) if not (no_predict or ray) else None
        if told is not None:
            say(_promise(told, where), err)
        base_model = str(Path(model).resolve()) if Path(model).is_dir() else model
        with bar(made.parameters) as update:
            result = compress_checkpoint(
                source.checkpoint,
                source.inventory,
                made,
                output,
                base_model=base_model,
                command=shlex.join(["milo", *sys.argv[1:]]),
                importance=importance,
                ray=ray,
                pool=pool,
                max_shard_size=_bytes(max_shard_size),
                overwrite=overwrite,
                restart=restart,
                progress=lambda done, total, name: update(done, name),
            )
    errors = [matrix["error"] for matrix in result.report["matrices"]]
    say(
        f"{output}: {size(result.report['files_bytes'])} in {result.seconds:.1f} s, "
        f"{made.bits_per_weight:.3f} bits a weight, mean relative error {sum(errors) / len(errors):.4f}, "
        f"peak memory {_memory(result.peak.host, result.peak.gpu)}"
    )
    if result.kept:
        say(f"resumed: {result.kept / made.parameters:.0%} of the weights had been finished before, and were verified")
    elif told is not None:
        say(f"predicted: {told.seconds:.1f} s, {_memory(told.host_bytes, told.gpu_bytes)}")


def profile(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 text; WikiText-2 by default.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the counts.")] = Path("counts.json"),
    max_tokens: Annotated[int, typer.Option(help="Tokens to route.")] = 100_000,
    window: Annotated[int, typer.Option(help="Tokens a forward pass.")] = 512,
    device: DeviceOption = "cpu",
) -> None:
    """Count how often each expert is chosen on a text, for the frequency policy."""
    content, name = load_text(text)
    folder = find_model(model)
    ids = tokenize(load_tokenizer(folder), content, max_tokens)
    loaded = load_model(folder, device=device)
    with bar() as update:
        counts = routing_counts(loaded, ids, window, update)
    data = {"model": model, "text": name, "tokens": len(ids), "counts": counts}
    try:
        write_atomically(output, json.dumps(data))
    except OSError as error:
        raise MiloError(f"cannot write {output}: {error}") from error
    spread = max(max(c) / max(1, min(c)) for c in counts.values())
    say(f"{output}: {len(counts)} layers, {len(ids):,} tokens; most to least chosen expert up to {spread:.1f}×")


def _make_plan(source: Source, recipe: Recipe, counts: Path | None) -> Plan:
    groups = len(source.inventory.groups)
    with bar(groups) as update:
        seen = iter(range(groups))
        return plan_source(
            source,
            recipe,
            counts=read_counts(counts),
            on_group=lambda name: update(next(seen), f"kurtosis of {name}"),
        )


def _print_plan(made: Plan, source: Source, files: int) -> None:
    table = Table(title=f"{source.checkpoint.folder} · {made.recipe} · ranks {made.policy}", title_justify="left")
    for column in (
        "matrices",
        "role",
        "shape",
        "count",
        "bits",
        "group",
        "rank (mean)",
        "bytes",
        "bits/weight",
    ):
        table.add_column(column, justify="left" if column in ("matrices", "role") else "right", no_wrap=True)
    for template, rows in _by_template(made).items():
        first = rows[0]
        ranks = [rank for row in rows for rank in row.ranks]
        parameters, nbytes = sum(row.parameters for row in rows), sum(row.nbytes for row in rows)
        low, high = min(ranks), max(ranks)
        spread = f"{low}" if low == high else f"{low}-{high} ({sum(ranks) / len(ranks):.1f})"
        table.add_row(
            template,
            str(first.role),
            "×".join(map(str, first.shape)),
            f"{len(ranks):,}",
            str(first.encoding.bits),
            str(first.encoding.group_size),
            spread,
            f"{nbytes:,}",
            f"{8 * nbytes / parameters:.3f}",
        )
    out.print(table)
    sixteen = source.sixteen_bit_bytes
    say(
        f"compressed: {made.parameters:,} weights in {made.nbytes:,} bytes = {made.bits_per_weight:.4f} bits a weight "
        f"({made.nbytes / sixteen:.1%} of 16 bits)"
    )
    kept = files - made.nbytes
    say(f"files: {files:,} bytes, of which {kept:,} are kept as they are (embeddings, norms, routers, headers)")
    if made.clipped:
        say(f"{made.clipped} matrices asked for more rank than min(N, K) and were clipped to it")


def _promise(told: Prediction, devices: Sequence[str]) -> str:
    who = f"{told.workers} CPU threads" if set(devices) == {"cpu"} else ", ".join(devices)
    return f"about {told.seconds:.0f} s on {who}, {_memory(told.host_bytes, told.gpu_bytes)} of memory"


def _memory(host: int, gpu: int) -> str:
    return size(host) + (f" and {size(gpu)} on the GPU" if gpu else "")


def _by_template(made: Plan) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in made.rows:
        grouped[LAYER_INDEX.sub("#", row.name, count=1)].append(row)
    return grouped


def _bytes(text: str) -> int:
    units: dict[str, Any] = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            text, scale = text[: -len(unit)], factor
            break
    else:
        scale = 1
    try:
        value = int(float(text) * scale)
    except ValueError:
        value = 0
    if value <= 0:
        raise typer.BadParameter(f"{text!r} is no size; write 5GB, 500MB or a number of bytes")
    return min(value, MAX_SHARD_SIZE * 100)
