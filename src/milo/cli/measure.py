"""`milo eval`, `milo inspect` and `milo generate`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from milo.checkpoint.compressed import REPORT, CompressedCheckpoint
from milo.checkpoint.hub import find_model
from milo.cli.console import bar, out, print_json, say, size
from milo.cli.options import BEST_DEVICE, DeviceOption, FolderArgument, JsonOption, ModelArgument
from milo.evaluate.folder import Evaluation, evaluate_folder, load_model, load_tokenizer
from milo.evaluate.text import load_text
from milo.pipeline.card import save_evaluation

DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


def evaluate(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 text; WikiText-2 by default.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    stride: Annotated[int, typer.Option(help="Stride of the paper's sliding protocol; 0 leaves it out.")] = 512,
    original: Annotated[str | None, typer.Option(help="Model to diverge from; the recorded source by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Judge on the first tokens only.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = BEST_DEVICE,
    save: Annotated[bool, typer.Option("--save", help="Keep it in MODEL/milo_eval.json and the card.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity in both protocols, divergence from the original, exact bytes."""
    content, name = load_text(text)
    if save:
        CompressedCheckpoint(find_model(model))  # refuses another model now and not after it was judged
    with bar() as update:
        result = evaluate_folder(
            model,
            content,
            name,
            original=original,
            window=window,
            stride=stride or None,
            max_tokens=max_tokens,
            dtype=dtype,
            device=device,
            progress=update,
        )
    if save:
        save_evaluation(find_model(model), result.to_json())
    if as_json:
        print_json(result.to_json())
    else:
        _print_evaluation(result)


def inspect(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """What is in a compressed folder: bits, rank and error by role."""
    checkpoint = CompressedCheckpoint(find_model(folder))
    matrices = checkpoint.report["matrices"] if checkpoint.has_report else []
    errors: dict[str, list[float]] = defaultdict(list)
    for matrix in matrices:
        errors[matrix["role"]].append(matrix["error"])
    roles: dict[str, dict[str, Any]] = {}
    for row in checkpoint.plan.rows:
        entry = roles.setdefault(
            str(row.role),
            {"matrices": 0, "weights": 0, "bytes": 0, "bits": set(), "ranks": [], "factor": set()},
        )
        entry["matrices"] += len(row.ranks)
        entry["weights"] += row.parameters
        entry["bytes"] += row.nbytes
        entry["bits"].add(row.encoding.bits)
        entry["factor"].add(row.encoding.factor)
        entry["ranks"] += row.ranks
    summary = [_role_summary(role, entry, errors.get(role, [])) for role, entry in roles.items()]
    plan = checkpoint.plan
    worst = sorted(matrices, key=lambda m: -m["error"])[:5]
    data = {
        "folder": str(checkpoint.folder),
        "base_model": checkpoint.base_model,
        "recipe": plan.recipe,
        "policy": plan.policy,
        "compressed_weights": plan.parameters,
        "compressed_bytes": plan.nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "roles": summary,
        "worst": worst,
    }
    if as_json:
        print_json(data)
        return
    table = Table(title=f"{folder} · {plan.recipe} · ranks {plan.policy}", title_justify="left")
    columns = (
        "role",
        "matrices",
        "weights",
        "bits",
        "rank min-max (mean)",
        "bytes",
        "bits/weight",
        "error",
        "worst",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "role" else "right")
    for s in summary:
        error = ["-", "-"] if s["mean_error"] is None else [f"{s['mean_error']:.4f}", f"{s['max_error']:.4f}"]
        table.add_row(
            s["role"],
            f"{s['matrices']:,}",
            f"{s['weights']:,}",
            "/".join(map(str, s["bits"])),
            f"{s['min_rank']}-{s['max_rank']} ({s['mean_rank']:.1f})",
            f"{s['bytes']:,}",
            f"{s['bits_per_weight']:.3f}",
            *error,
        )
    out.print(table)
    say(f"{plan.parameters:,} weights in {plan.nbytes:,} bytes = {plan.bits_per_weight:.4f} bits a weight")
    for matrix in worst:
        say(f"  error {matrix['error']:.4f}  rank {matrix['rank']:<5} {matrix['name']}")
    if not matrices:
        say(f"no {REPORT} here (the folder was saved again), so errors are unknown")


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = BEST_DEVICE,
) -> None:
    """Continue a prompt with a compressed (or original) model."""
    folder = find_model(model)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, dtype, device)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = cast(Any, loaded).generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    say(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _role_summary(role: str, entry: dict[str, Any], errors: list[float]) -> dict[str, Any]:
    return {
        "role": role,
        "matrices": entry["matrices"],
        "weights": entry["weights"],
        "bytes": entry["bytes"],
        "bits": sorted(entry["bits"]),
        "factor": sorted(entry["factor"]),
        "bits_per_weight": 8 * entry["bytes"] / entry["weights"],
        "min_rank": min(entry["ranks"]),
        "max_rank": max(entry["ranks"]),
        "mean_rank": fmean(entry["ranks"]),
        "mean_error": fmean(errors) if errors else None,
        "max_error": max(errors) if errors else None,
    }


def _print_evaluation(result: Evaluation) -> None:
    table = Table(title=f"{result.model} on {result.text}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    s, c = result.size, result.contiguous
    table.add_row(f"perplexity, windows of {c.window} side by side", f"{c.ppl:.4f}")
    if result.sliding is not None:
        w = result.sliding
        table.add_row(f"perplexity, windows of {w.window} every {w.stride} (the paper's)", f"{w.ppl:.4f}")
    if result.divergence is not None:
        d = result.divergence
        table.add_row(f"KL divergence from {result.original}, nats a token", f"{d.kl:.5f} ± {d.kl_se:.5f}")
        table.add_row("KL at the 50th / 90th / 99th percentile", f"{d.kl_p50:.5f} / {d.kl_p90:.5f} / {d.kl_p99:.5f}")
        table.add_row("same first choice", f"{d.top1:.2%}")
    table.add_row("tokens scored", f"{c.tokens:,}")
    if s.bits_per_weight is not None:
        table.add_row("compressed matrices", f"{s.compressed_bytes:,} bytes ({s.bits_per_weight:.4f} bits a weight)")
    table.add_row("all tensors", f"{s.tensor_bytes:,} bytes ({size(s.tensor_bytes)})")
    table.add_row("whole folder", f"{s.folder_bytes:,} bytes")
    out.print(table)
