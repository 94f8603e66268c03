"""Draw the times of `moe.py` and `linear.py` against the limit of the memory: the picture of `docs/kernels.md`.

    python benchmarks/roofline.py benchmarks/results/moe_h100.json [benchmarks/results/linear_h100.json] \
        --out docs/images/kernels_h100.png

Microseconds over tokens, both on logarithmic axes, one panel a shape; what was not timed is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

# What a row holds, how it is called, and Okabe and Ito's colours; the markers say the same in grey.
SERIES = (
    ("ours_us", "MiLo, whole", "#0072B2", "o"),
    ("ours_rank0_us", "MiLo, rank 0", "#56B4E9", "o"),
    ("humming_w3_us", "Humming W3, products", "#D55E00", "s"),
    ("humming_w4_us", "Humming W4, products", "#E69F00", "D"),
    ("bf16_us", "bf16, products", "#009E73", "^"),
    ("limit_us", "limit: bytes / read bandwidth", "#000000", ""),
)
COLUMNS = 3


def draw(results: Sequence[Mapping[str, Any]], path: Path, routing: str = "random") -> list[str]:
    """Draw one panel for each shape and rank.

    Args:
        results: what the benchmarks wrote.
        path: file to write, PNG by its suffix.
        routing: of the MoE rows that are drawn; rows without the word are random ones.

    Returns:
        The panels' titles.

    Raises:
        ValueError: there is no row to draw.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            if row.get("routing", "random") == routing:
                panels.setdefault(f"{row['shape']}, rank {row['rank']}", []).append(row)
    if not panels:
        raise ValueError(f"no row of routing {routing!r}")
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.2 * min(COLUMNS, len(panels)), 3.9 * lines), dpi=150, layout="constrained")
    axes = figure.subplots(lines, min(COLUMNS, len(panels)), squeeze=False).flat
    handles: dict[str, Any] = {}
    for panel, (title, rows) in zip(axes, panels.items(), strict=False):
        handles |= _panel(panel, title, sorted(rows, key=lambda row: row["tokens"]))
    for panel in list(axes)[len(panels) :]:
        panel.remove()
    device = results[0]["device"]
    figure.suptitle(f"{device}, read {results[0]['read_tb_s']:.2f} TB/s", fontsize=11)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return list(panels)


def _panel(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw one; gives the lines by name."""
    drawn = {}
    for key, name, colour, marker in SERIES:
        points = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            style = {"marker": marker, "markersize": 4} if marker else {"linestyle": "--"}
            (drawn[name],) = axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, **style)
    axes.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel="µs")
    axes.title.set_fontsize(10)
    tokens = sorted({row["tokens"] for row in rows})
    axes.set_xticks(tokens, [f"{each:,}" for each in tokens])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--routing", default="random")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    draw([json.loads(path.read_text()) for path in options.results], options.out, options.routing)


if __name__ == "__main__":
    main()
