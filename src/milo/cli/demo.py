"""`milo demo`: a real MoE trained here, compressed four ways, measured, drawn. No network, no files of ours."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.constants import HF_HOME
from rich.table import Table

from milo.cli.console import bar, err, out, say
from milo.demo.corpus import stdlib_corpus
from milo.demo.plot import ResultRow, plot_results
from milo.demo.train import train_demo_model
from milo.evaluate.folder import evaluate_folder
from milo.integrations.transformers.source import open_source
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.planning import plan_source
from milo.pipeline.work import one_thread
from milo.plan.recipe import PRESETS, preset

WINDOW = 256
EVAL_TOKENS = 32_768


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where results go.")] = Path("milo-demo"),
    seconds: Annotated[float, typer.Option(help="Training time; a trained model is kept and used again.")] = 60.0,
    cache: Annotated[Path, typer.Option(help="Where the trained model is kept.")] = Path(HF_HOME) / "milo-demo",
) -> None:
    """Train a small Mixtral on the standard library's own text, compress it with every recipe, show what it cost."""
    begin = time.perf_counter()
    with bar() as update:
        model = train_demo_model(cache, seconds, progress=update)
    say(f"model: {model} ({time.perf_counter() - begin:.0f} s)", err)
    _, text = stdlib_corpus()
    rows = [_measure(model, "original", text, None, 0.0)]
    for recipe in PRESETS:
        folder = output / recipe
        rows.append(_measure(folder, recipe, text, model, _compress(model, recipe, folder)))
    plot = output / "demo.png"
    plot_results(rows, plot, title="A small Mixtral trained here, compressed by each recipe")
    out.print(_table(rows))
    say(
        f"plot: {plot}\nIn the same way: milo quantize MODEL -o OUT --recipe milo-s1; milo inspect {output}/milo-s2 "
        f"shows what is inside. {time.perf_counter() - begin:.0f} s in all."
    )


def _compress(model: Path, recipe: str, folder: Path) -> float:
    source = open_source(str(model))
    made = plan_source(source, preset(recipe, source.checkpoint.config))
    shutil.rmtree(folder, ignore_errors=True)  # results of an earlier demo
    with bar(made.parameters) as update:
        result = compress_checkpoint(
            source.checkpoint,
            source.inventory,
            made,
            folder,
            base_model=str(model),
            progress=lambda done, total, name: update(done, f"{recipe}: {name}"),
        )
    return result.seconds


def _measure(folder: Path, name: str, text: str, original: Path | None, seconds: float) -> ResultRow:
    # For a model this small one thread is as fast as two, and far faster where another process wants a core.
    with bar() as update, one_thread():
        found = evaluate_folder(
            str(folder),
            text,
            "held-out modules of the standard library",
            original=str(original) if original else None,
            window=WINDOW,
            stride=None,
            max_tokens=EVAL_TOKENS,
            dtype="float32",
            progress=lambda fraction, message: update(fraction, f"{name}: {message}"),
        )
    assert found.contiguous is not None  # there was a text
    diverged = found.divergence
    return ResultRow(
        recipe=name,
        bytes=found.size.tensor_bytes,
        bits_per_weight=found.size.bits_per_weight or 16.0,
        perplexity=found.contiguous.ppl,
        kl=diverged.kl if diverged else None,
        kl_se=diverged.kl_se if diverged else None,
        seconds=seconds,
    )


def _table(rows: list[ResultRow]) -> Table:
    table = Table(title="on held-out modules of the standard library", title_justify="left")
    for column in ("recipe", "bytes", "bits/weight", "perplexity", "KL from the original", "seconds"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in rows:
        kl = "-" if row.kl is None else f"{row.kl:.4f} ± {row.kl_se:.4f}"
        table.add_row(
            row.recipe,
            f"{row.bytes:,}",
            f"{row.bits_per_weight:.3f}",
            f"{row.perplexity:.3f}",
            kl,
            f"{row.seconds:.1f}" if row.seconds else "-",
        )
    return table
