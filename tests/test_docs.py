"""The documentation tells the truth: tables come from committed results, commands and links exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    ("script", "results"),
    [("quality_table.py", "quality_*"), ("tasks_table.py", "tasks_*"), ("tasks_table.py", "routing_*")],
)
def test_results_page_quotes_the_committed_benchmarks(script: str, results: str) -> None:
    files = sorted(map(str, (ROOT / "benchmarks/results").glob(f"{results}.json")))
    assert files
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *files], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() in (ROOT / "docs/results.md").read_text()


def test_bytes_of_the_benchmarks_are_the_plans() -> None:
    for path in (ROOT / "benchmarks/results").glob("quality_*.json"):
        for row in json.loads(path.read_text())["rows"][1:]:
            assert row["compressed_bytes"] == row["plan_bytes"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        # Pages elsewhere are not asked for: the tests have no network.
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_command_has_a_section() -> None:
    from milo.cli.app import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    sections = set(re.findall(r"^## milo (\w+)$", (ROOT / "docs/cli.md").read_text(), re.M))
    assert sections == names


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- test command -->\n```bash\n(.+?)\n```\n<!-- end -->", readme)
    assert block
    assert "pytest" in block[1]
    assert "<!-- test command -->" in (ROOT / ".ci/run").read_text()
