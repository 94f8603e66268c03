"""The report's figures as PNG files, for papers and slides: the page's numbers and colours, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from milo.checkpoint.writer import explained
from milo.report.colour import Scale, ramp
from milo.report.data import PARTS, ReportData
from milo.report.maps import Map, expert_maps, single_map
from milo.report.names import quantity_name, role_name

_INK, _SOFT = "#1c1f24", "#5f6670"
# As in page.css: compensators are what MiLo adds, and have the accent.
_PART_COLOURS = dict(zip(PARTS, ("#4a5568", "#9aa3af", "#c2540a", "#d5d8dc"), strict=True))


def write_figures(data: ReportData, folder: Path) -> list[Path]:
    """Draw every figure that the folder's numbers allow.

    Args:
        data: what the report shows.
        folder: where the PNG files go; made if needed.

    Returns:
        The files.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    experts, singles = expert_maps(data), single_map(data)
    draw: dict[str, Callable[[], Figure | None]] = {
        "bytes": lambda: _bytes(data),
        "expert_error": lambda: _maps(data.title, experts, "error"),
        "expert_rank": lambda: _maps(data.title, experts, "rank"),
        "dense_error": lambda: _maps(data.title, [singles] if singles else [], "error"),
        "dense_rank": lambda: _maps(data.title, [singles] if singles else [], "rank"),
        "distribution": lambda: _distribution(data),
    }
    written = []
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in draw.items():
            figure = make()
            if figure is not None:
                figure.savefig(folder / f"{name}.png")
                written.append(folder / f"{name}.png")
    return written


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=_INK)
    return figure


def _bytes(data: ReportData) -> Figure:
    roles = list(reversed(data.roles))
    figure = _figure(8, 1.4 + 0.32 * len(roles), f"{data.title}: where the bytes are")
    axes = figure.subplots()
    names = [role_name(role.role) for role in roles]
    start = np.zeros(len(roles))
    for part, colour in _PART_COLOURS.items():
        length = np.array([role.parts[part] for role in roles]) / 2**20
        axes.barh(names, length, left=start, color=colour, label=part, height=0.6)
        start += length
    axes.set_xlabel("MiB", fontsize=8, color=_SOFT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=_SOFT, labelsize=8, length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _maps(title: str, maps: Sequence[Map], quantity: str) -> Figure | None:
    values = np.concatenate([found.values(quantity).ravel() for found in maps]) if maps else np.array([])
    if not np.isfinite(values).any():
        return None
    scale = Scale.of(quantity, values)
    rows, columns = maps[0].error.shape
    stacked = columns > 72
    each = min(max(0.12 * rows, 1.1), 4.5)
    size = (11.0, 0.9 + (each + 0.5) * len(maps)) if stacked else (max(6.0, 3.7 * len(maps)), each + 1.2)
    figure = _figure(*size, f"{title}: {quantity_name(quantity)}")
    grid = figure.subplots(len(maps), 1, squeeze=False) if stacked else figure.subplots(1, len(maps), squeeze=False)
    colours = ListedColormap(ramp(quantity, "light") / 255)
    for axes, found in zip(grid.ravel(), maps, strict=True):
        edges = {"edgecolors": "white", "linewidth": 0.8} if found.error.size <= 2000 else {}
        where = scale.position(found.values(quantity))
        image = axes.pcolormesh(where, cmap=colours, vmin=0, vmax=1, rasterized=True, **edges)
        axes.invert_yaxis()
        axes.set_title(found.title if found.axes[0] else "", fontsize=9, loc="left", color=_INK)
        axes.set_xlabel(found.axes[1], fontsize=8, color=_SOFT)
        axes.set_ylabel(found.axes[0], fontsize=8, color=_SOFT)
        axes.set_xticks(*_ticks(found.columns, 16))
        axes.set_yticks(*_ticks(found.rows, 16))
        axes.tick_params(colors=_SOFT, labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    places, labels = zip(*scale.ticks(), strict=True)
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.9, aspect=14)
    bar.set_ticks(list(places), labels=list(labels))
    bar.ax.tick_params(colors=_SOFT, labelsize=7)
    bar.outline.set_visible(False)
    return figure


def _distribution(data: ReportData) -> Figure | None:
    found = data.errors_by_role
    if not found:
        return None
    edges = data.error_edges()
    figure = _figure(8, 0.7 + 1.1 * len(found), f"{data.title}: matrices by {quantity_name('error')}")
    grid = figure.subplots(len(found), 1, sharex=True, squeeze=False)
    for axes, (role, errors) in zip(grid.ravel(), found.items(), strict=True):
        axes.hist(errors, edges, color="#4a5568", rwidth=0.9)
        axes.axvline(float(np.median(errors)), color="#c2540a", linewidth=1.2)
        label = f"{role_name(role)}: {len(errors):,}, median {np.median(errors):.4f}"
        axes.set_title(label, fontsize=8, loc="left", color=_INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=_SOFT, labelsize=7, length=0)
        axes.set_yticks([])
    return figure


def _ticks(names: Sequence[str], most: int) -> tuple[list[float], list[str]]:
    every = -(-len(names) // most)
    places = list(range(0, len(names), every))
    return [place + 0.5 for place in places], [names[place] for place in places]
