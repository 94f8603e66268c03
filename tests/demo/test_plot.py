"""The plot is written, whatever the rows hold, and shows each of them."""

from __future__ import annotations

import math

import matplotlib
import pytest

from milo.demo.plot import ResultRow, plot_results

ROWS = [
    ResultRow("original", 16_300_000, 16.0, 60.1, None, None, 0.0),
    ResultRow("rtn", 4_100_000, 3.5, 66.2, 0.09, 0.004, 1.0),
    ResultRow("milo-s1", 4_300_000, 3.7, 63.0, 0.05, math.nan, 12.0),
    ResultRow("milo-s2", 4_500_000, 3.9, 62.0, 0.03, None, 14.0),
]


def test_a_png_is_written(tmp_path):
    path = tmp_path / "plot.png"
    plot_results(ROWS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_every_row_the_axes_and_the_title_are_named(tmp_path):
    path = tmp_path / "plot.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        plot_results(ROWS, path, title="Title of the plot")
    text = path.read_text(encoding="utf-8")
    for named in (
        "Title of the plot",
        "original (16.3 MB)",
        "rtn (3.50 bits",
        "milo-s2 (3.90 bits",
        "log scale",
        "MB<",
    ):
        assert named in text


def test_many_recipes_have_markers_of_their_own(tmp_path):
    rows = [ResultRow(f"recipe {i}", 4_000_000 + i, 3.5, 60.0 + i, 0.1 / (i + 1), 0.001, 1.0) for i in range(20)]
    plot_results(rows, tmp_path / "plot.png")


def test_nothing_compressed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_results(ROWS[:1], tmp_path / "plot.png")
