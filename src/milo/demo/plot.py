"""The demo's picture: what each recipe keeps of the model against the bytes it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness; the markers say the same in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MEGABYTE = 1e6


@dataclass(frozen=True)
class ResultRow:
    """One model of the demo's table.

    Attributes:
        recipe: The recipe's name, as shown.
        bytes: Size on disk.
        bits_per_weight: Mean bits of a compressed weight, everything it needs included.
        perplexity: On the held-out text.
        kl: Mean KL divergence from the original in nats a token; None for the original itself.
        kl_se: Standard error of ``kl``; None or NaN draws no error bar.
        seconds: Time the compression took.
    """

    recipe: str
    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float | None
    kl_se: float | None
    seconds: float


def plot_results(rows: Sequence[ResultRow], path: Path, title: str = "What each recipe keeps") -> None:
    """Draws KL divergence and perplexity against bytes, one marker a recipe.

    The original (``kl=None``) is several times larger than the rest, so it is drawn as the perplexity to
    reach, a dashed line, and not as a point that would squeeze the others together.

    Args:
        rows: The results; at least one compressed.
        path: File to write; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``).
        title: What the figure shows.

    Raises:
        ValueError: No row is a compressed model.
    """
    compressed = [row for row in rows if row.kl is not None]
    if not compressed:
        raise ValueError("nothing to plot: no row is a compressed model with a KL divergence")
    # A Figure of its own instead of pyplot's: no global state and no display.
    figure = Figure(figsize=(10, 5.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2)
    _draw_divergence(left, compressed)
    _draw_perplexity(right, compressed, [row for row in rows if row.kl is None])
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_divergence(axes: Axes, rows: Sequence[ResultRow]) -> None:
    measured = [(row.bytes, row.kl, row.kl_se) for row in rows if row.kl is not None]
    for index, (nbytes, kl, kl_se) in enumerate(measured):
        error = kl_se if kl_se is not None and math.isfinite(kl_se) else None
        axes.errorbar(nbytes / _MEGABYTE, kl, yerr=error, capsize=3, **_style(index))
    axes.set_yscale("log")
    _finish(axes, "Distance from the original's predictions", "mean KL divergence, nats a token (log scale)")


def _draw_perplexity(axes: Axes, rows: Sequence[ResultRow], originals: Sequence[ResultRow]) -> None:
    for index, row in enumerate(rows):
        label = f"{row.recipe} ({row.bits_per_weight:.2f} bits a weight)"
        axes.errorbar(row.bytes / _MEGABYTE, row.perplexity, label=label, **_style(index))
    for row in originals:
        label = f"{row.recipe} ({row.bytes / _MEGABYTE:.1f} MB)"
        axes.axhline(row.perplexity, color="0.4", linestyle="--", linewidth=1.2, label=label)
    _finish(axes, "Surprise at held-out text", "perplexity")


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 8,
        "linestyle": "none",
    }


def _finish(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(f"{title}\n(lower left is better)", fontsize=10)
    axes.set_xlabel("size on disk, MB")
    axes.set_ylabel(quantity)
    axes.margins(0.12)
    axes.grid(visible=True, which="both", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
