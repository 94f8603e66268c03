"""The documentation as a site: it builds strictly and offline, and a real browser finds nothing to complain of."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import browser

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(importlib.util.find_spec(name) is None for name in ("material", "mkdocstrings", "l2m4m")):
        pytest.skip("needs milo-moe[docs]")
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    dead = "http://127.0.0.1:9"  # whatever wants to fetch something fails
    proxies = {"http_proxy": dead, "https_proxy": dead, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **proxies}, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_every_page_is_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        built = site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        assert built.exists(), page.name


def test_the_api_page_is_the_docstrings(site: Path) -> None:
    from milo import compress_model

    text = re.sub(r"<[^>]+>|&\w+;", "", (site / "api/index.html").read_text("utf-8"))
    first = (compress_model.__doc__ or "").strip().splitlines()[0].replace("`", "")
    assert first in text


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["", "how-it-works/", "report/", "api/"])
def test_pages_in_a_browser(chromium: browser.Browser, address: str, page: str, width: int) -> None:
    chromium.open(address + page, width)
    assert chromium.complaints == []
    assert [url for url in chromium.requests if not url.startswith((address, "blob:"))] == []
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    if page == "how-it-works/":
        assert chromium.evaluate("document.querySelectorAll('math[display=block] mfrac').length") >= 3
        drawn = "[...document.querySelectorAll('math')].every(m => m.getBoundingClientRect().height > 15)"
        assert chromium.evaluate(drawn)
        assert "$$" not in chromium.evaluate("document.body.innerText")


def test_recipes_quote_the_committed_benchmarks() -> None:
    rows = {}
    for name in ("mixtral-29m", "deepseek-29m"):
        for row in json.loads((ROOT / f"benchmarks/results/quality_{name}.json").read_text())["rows"][1:]:
            cells = f"{row['bits_per_weight']:.3f} | {row['kl']:.4f} | {row['top1']:.1%}"
            rows.setdefault(row["recipe"], []).append(cells)
    page = (ROOT / "docs/recipes.md").read_text("utf-8")
    for recipe in ("rtn", "hqq", "milo-s1", "milo-s2"):
        assert f"| `{recipe}` | {' | '.join(rows[recipe])} |" in page
