"""What holds of the vLLM plugin where vLLM is not installed: it is announced, and nothing else imports vLLM."""

from __future__ import annotations

import ast
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

from milo.integrations.vllm.versions import supported

ROOT = Path(__file__).resolve().parents[2]


def test_the_entry_point_is_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert name == "milo"
    assert callable(EntryPoint(name, value, "vllm.general_plugins").load())


def test_only_the_plugins_own_modules_import_vllm_and_its_package_does_not() -> None:
    importing = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any((name or "").split(".")[0] == "vllm" for name in names):
                importing.add(file)
    plugin = ROOT / "src" / "milo" / "integrations" / "vllm"
    assert importing <= set(plugin.glob("*.py")) - {plugin / "__init__.py", plugin / "versions.py"}
    assert plugin / "config.py" in importing


def test_versions_between_the_tested_ones_are_served_on() -> None:
    asked = ["0.25.1", "0.26", "0.27.1", "0.33.4+cu130", "0.34.0", "1.0", "dev"]
    assert [version for version in asked if supported(version)] == ["0.26", "0.27.1", "0.33.4+cu130"]
