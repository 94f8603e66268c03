"""`milo eval`, `milo inspect` and `milo generate`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from milo.checkpoint.compressed import REPORT, CompressedCheckpoint
from milo.checkpoint.hub import find_model
from milo.cli.console import bar, out, print_json, say, size
from milo.cli.options import BEST_DEVICE, DeviceOption, FolderArgument, JsonOption, ModelArgument
from milo.evaluate.folder import Evaluation, describe_folder, evaluate_folder, load_model, load_tokenizer
from milo.evaluate.router import mean_and_worst
from milo.evaluate.scores import TaskEvaluation, TaskResult
from milo.evaluate.suite import task_names
from milo.evaluate.tasks import evaluate_tasks, load_tasks
from milo.evaluate.text import load_text
from milo.pipeline.card import save_evaluation

DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text; without it and without --tasks, WikiText-2.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    stride: Annotated[int, typer.Option(help="Stride of the paper's sliding protocol; 0 leaves it out.")] = 512,
    original: Annotated[str | None, typer.Option(help="Model to compare with; the recorded source by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Judge on the text's first tokens only.")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="paper, or lm-eval's names with commas: lambada,piqa,arc,...")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option("--task-dir", help="Read the tasks from published files there; no network.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each document; the paper's numbers by default.", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Documents of tasks run together.", min=1)] = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = BEST_DEVICE,
    save: Annotated[bool, typer.Option("--save", help="Keep it in MODEL/milo_eval.json and the card.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity, divergence from the original and exact bytes; or tasks."""
    if tasks is None and (task_dir is not None or limit is not None or num_fewshot is not None):
        raise typer.BadParameter("--task-dir, --limit and --num-fewshot are about tasks: name some with --tasks")
    # Before any model runs: a wrong name or path is known in seconds.
    if save:
        CompressedCheckpoint(find_model(model))
    ready = load_tasks(task_names(tasks), task_dir, num_fewshot) if tasks is not None else None
    if text is not None or ready is None:
        content, name = load_text(text)
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
    else:
        result = describe_folder(model)
    if ready is not None:
        judged = evaluate_tasks(
            model, ready, original=original, limit=limit, batch=batch_size, dtype=dtype, device=device
        )
        result = replace(result, tasks=judged)
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
    on = f" on {result.text}" if result.text is not None else ""
    table = Table(title=f"{result.model}{on}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    s, c = result.size, result.contiguous
    if c is not None:
        table.add_row(f"perplexity, windows of {c.window} side by side", f"{c.ppl:.4f}")
    if result.sliding is not None:
        w = result.sliding
        table.add_row(f"perplexity, windows of {w.window} every {w.stride} (the paper's)", f"{w.ppl:.4f}")
    if result.divergence is not None:
        d = result.divergence
        table.add_row(f"KL divergence from {result.original}, nats a token", f"{d.kl:.5f} ± {d.kl_se:.5f}")
        table.add_row("KL at the 50th / 90th / 99th percentile", f"{d.kl_p50:.5f} / {d.kl_p90:.5f} / {d.kl_p99:.5f}")
        table.add_row("same first choice", f"{d.top1:.2%}")
        routers = mean_and_worst(d.routing)
        if routers is not None:
            mean, worst = routers
            table.add_row(f"same {worst.top_k} experts, mean of {len(d.routing)} layers", f"{mean:.2%}")
            table.add_row(f"same {worst.top_k} experts, worst layer ({worst.layer})", f"{worst.same_set:.2%}")
    if c is not None:
        table.add_row("tokens scored", f"{c.tokens:,}")
    if s.bits_per_weight is not None:
        table.add_row("compressed matrices", f"{s.compressed_bytes:,} bytes ({s.bits_per_weight:.4f} bits a weight)")
    table.add_row("all tensors", f"{s.tensor_bytes:,} bytes ({size(s.tensor_bytes)})")
    table.add_row("whole folder", f"{s.folder_bytes:,} bytes")
    out.print(table)
    if result.tasks is not None:
        _print_tasks(result.tasks)


def _print_tasks(judged: TaskEvaluation) -> None:
    limit = f", first {judged.limit} documents of each" if judged.limit is not None else ""
    table = Table(title=f"tasks from {judged.source}{limit}, by lm-eval {judged.lm_eval}", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for column in ("shots", "documents", "original", "model", "difference"):
        table.add_column(column, justify="right")
    for row in judged.results:
        if row.part_of is None:
            metric = f"{row.metric} *" if row.in_paper else row.metric
            original = _with_error(row.original, row.original_stderr)
            model = _with_error(row.value, row.stderr)
            table.add_row(row.task, metric, str(row.shots), f"{row.documents:,}", original, model, _difference(row))
    out.print(table)
    say("± standard errors; the difference's is paired over documents. * the metric that the paper reports")


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _difference(row: TaskResult) -> str:
    if row.difference is None:
        return "-"
    return f"{row.difference:+.4f}" + (f" ± {row.difference_stderr:.4f}" if row.difference_stderr is not None else "")
