"""The frontier: quality against bytes, for recipes and for budgets of several sizes, as numbers and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours; the markers say the same in grey.
_RECIPES = (("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#000000", "P"))


@dataclass(frozen=True)
class Point:
    """One compressed model.

    Attributes:
        recipe: its name, or the budget as written.
        budget: whether the allocator made it.
        compressed_bytes: bytes of the compressed matrices, counted from the files.
        bits_per_weight: of these.
        folder_bytes: every file of the folder.
        kl: mean KL divergence from the original, nats a token.
        kl_se: its standard error over windows.
        perplexity: on the same text.
        seconds: time to compress.
    """

    recipe: str
    budget: bool
    compressed_bytes: int
    bits_per_weight: float
    folder_bytes: int
    kl: float
    kl_se: float
    perplexity: float
    seconds: float


def draw_frontier(points: Sequence[Point], original_perplexity: float, path: Path, title: str) -> None:
    """KL divergence (log scale) and perplexity against bits a weight; budgets are joined by a line.

    Args:
        points: at least one.
        original_perplexity: drawn as the line to reach.
        path: file to write, PNG by its suffix.
        title: what the figure shows.
    """
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")  # not pyplot: no global state, no display
    figure.suptitle(title, fontsize=12)
    left, right = figure.subplots(1, 2)
    _series(left, points, [point.kl for point in points])
    left.set_yscale("log")
    _finish(left, "mean KL divergence from the original, nats a token")
    _series(right, points, [point.perplexity for point in points])
    right.axhline(original_perplexity, color="0.4", linestyle="--", linewidth=1, label="original")
    _finish(right, "perplexity")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path)


def _series(axes: Axes, points: Sequence[Point], values: Sequence[float]) -> None:
    pairs = list(zip(points, values, strict=True))
    ours = sorted((point.bits_per_weight, value) for point, value in pairs if point.budget)
    if ours:
        axes.plot(*zip(*ours, strict=True), label="budget", color="#0072B2", marker="o")
    others = [(point, value) for point, value in pairs if not point.budget]
    for index, (point, value) in enumerate(others):
        colour, marker = _RECIPES[index % len(_RECIPES)]
        axes.plot(point.bits_per_weight, value, color=colour, marker=marker, linestyle="none", label=point.recipe)


def _finish(axes: Axes, quantity: str) -> None:
    axes.set_xlabel("bits a compressed weight, all its data included")
    axes.set_ylabel(quantity)
    axes.grid(visible=True, which="both", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
