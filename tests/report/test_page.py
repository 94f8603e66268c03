"""The page in a real browser: it loads without a word of complaint, fits a phone, and its cells answer."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import browser
import builders
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.report.data import ReportData, gather
from milo.report.page import render
from milo.report.plots import write_figures
from report.conftest import EVALUATION


@pytest.fixture(scope="module")
def folder(compressed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder with an evaluation and a command that wants to be escaped."""
    out = builders.copied(compressed_folder, tmp_path_factory.mktemp("report") / "out")
    (out / "milo_eval.json").write_text(json.dumps(EVALUATION))
    builders.edit_json(out / "milo_report.json", command="milo quantize '<script>alert(1)</script>' -o out")
    return out


@pytest.fixture(scope="module")
def pages(folder: Path, large: ReportData, fused: ReportData) -> dict[str, Path]:
    found = {"small": gather(CompressedCheckpoint(folder)), "large": large, "fused": fused}
    paths = {}
    for name, data in found.items():
        paths[name] = folder.parent / f"{name}.html"
        paths[name].write_text(render(data), encoding="utf-8")
    return paths


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["small", "large", "fused"])
def test_page(chromium: browser.Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    chromium.open(pages[name], width, dark)
    assert chromium.complaints == []
    assert chromium.requests == [pages[name].resolve().as_uri()]  # nothing else was asked for
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    seen = """[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0
              && s.getAttribute('role') === 'img' && s.querySelector('title').textContent
              && s.querySelector('desc')).length"""
    drawn = chromium.evaluate("document.querySelectorAll('svg').length")
    assert chromium.evaluate(seen) == drawn >= (6 if name == "fused" else 18)  # without errors there is less to draw
    shown = """[...document.querySelectorAll('image.cells')].filter(i => getComputedStyle(i).display !== 'none')
               .every(i => i.classList.contains('on-%s'))"""
    assert chromium.evaluate(shown % ("dark" if dark else "light"))
    background = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark


def test_tables_stand_beside_the_pictures(chromium: browser.Browser, pages: dict[str, Path], folder: Path) -> None:
    chromium.open(pages["small"], 1280)
    text = chromium.evaluate("document.body.textContent")
    report = json.loads((folder / "milo_report.json").read_text())
    for matrix in sorted(report["matrices"], key=lambda m: -m["error"])[:5]:
        assert matrix["name"] in text
        assert f"{matrix['error']:.4f}" in text
    assert report["command"] in text
    assert "KL divergence from the original" in text
    assert "same top k" in text
    assert chromium.evaluate("document.querySelectorAll('table').length") >= 7


def test_a_cell_under_the_pointer_or_the_keys_is_named(chromium: browser.Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["small"], 1280)
    box = chromium.evaluate(
        """(() => { const map = document.querySelector('.map'); map.scrollIntoView();
        const [x, y, w, h] = map.dataset.box.split(' ').map(Number), at = map.firstChild.getBoundingClientRect();
        const grid = numbers[map.dataset.map];
        return [at.left + x + w * 2.5 / grid.columns, at.top + y + h * 1.5 / grid.rows]; })()"""
    )
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    readout = "document.querySelector('.readout').textContent"
    template = chromium.evaluate("numbers[document.querySelector('.map').dataset.map].templates[0]")
    assert template.replace("{}", "1").replace("*", "2") in chromium.evaluate(readout)
    outlined = "[...document.querySelectorAll('.cursor')].filter(c => c.getAttribute('width') > 0).length"
    assert chromium.evaluate(outlined) == 2  # in the map of errors and in that of ranks
    chromium.evaluate("document.querySelector('.map').focus()")
    for kind in ("keyDown", "keyUp"):
        chromium.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight")
    assert template.replace("{}", "1").replace("*", "3") in chromium.evaluate(readout)
    assert chromium.complaints == []


class _Outside(HTMLParser):
    """Collects every address that a page could ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def test_the_file_needs_nothing_else_and_stays_small(pages: dict[str, Path]) -> None:
    for path in pages.values():
        page = path.read_text(encoding="utf-8")
        outside = _Outside()
        outside.feed(page)
        assert all(address.startswith("data:") for address in outside.found)
        assert "url(http" not in page
        assert "@import" not in page
        assert "<script>alert(1)" not in page
    assert pages["large"].stat().st_size < 3_000_000


def test_figures_as_png(folder: Path, fused: ReportData, tmp_path: Path) -> None:
    names = {path.name for path in write_figures(gather(CompressedCheckpoint(folder)), tmp_path / "png")}
    assert names == {f"{n}.png" for n in ("bytes", "expert_error", "expert_rank", "dense_error", "dense_rank")} | {
        "distribution.png"
    }
    for name in names:
        with Image.open(tmp_path / "png" / name) as image:
            assert min(image.size) > 150
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    assert {path.name for path in write_figures(fused, tmp_path / "fused")} == {"bytes.png", "expert_rank.png"}
