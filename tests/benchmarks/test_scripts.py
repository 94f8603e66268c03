"""The benchmark scripts run from end to end at toy size; their figures mean something on a GPU only."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from judged import tiny_mixtral
from task_files import letters, write_task_files

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_generate(tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    options = ["--shape", "tiny", "--layers", "1", "--device", "cpu", "--steps", "2", "--batch", "1", "--out", str(out)]
    subprocess.run([sys.executable, str(BENCHMARKS / "generate.py"), *options], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["left_to_reference"] == {}
    assert all(found["rows"][0][f"{variant}_ms"] > 0 for variant in ("kernels", "reference", "bf16"))
    assert found["reference_bytes"] < found["bf16_bytes"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "model"
    tiny_mixtral(0, hidden_size=128, intermediate_size=128, max_position_embeddings=512).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def run_here(script: str, out: Path, *options: str | Path) -> tuple[dict, str]:
    """Run a script in this process, which has everything imported: its JSON, and its table by `tasks_table.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds of `pip list` and the like
        patch.setattr(sys, "argv", [script, *map(str, options), "--device", "cpu", "--out", str(out)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        found = json.loads(out.read_text())
        table = runpy.run_path(str(BENCHMARKS / "tasks_table.py"))
    return found, table["routing_table" if script == "routing.py" else "tasks_table"](found)


def test_tasks(model: Path, tmp_path: Path) -> None:
    files = write_task_files(tmp_path)
    found, table = run_here("tasks.py", tmp_path / "tasks.json", model, "--task-dir", files, "--limit", "2")
    assert [row["recipe"] for row in found["rows"]] == ["original (bf16)", "rtn", "hqq", "milo-s1", "milo-s2"]
    assert all(each["difference"] is None for each in found["rows"][0]["results"])
    assert all(each["documents"] == 2 for row in found["rows"] for each in row["results"])
    assert len(table.splitlines()) == 2 + 5


def test_routing(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    found, table = run_here("routing.py", tmp_path / "routing.json", model, "--text", text, "--window", "64")
    assert all(len(row["routing"]) == 2 and row["tokens"] > 0 for row in found["rows"])
    assert "layer 1" in table
    assert len(table.splitlines()) == 2 + 4


def test_budget(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    (tmp_path / "lambada.jsonl").write_text('{"text": "' + "A passage of words. " * 9 + '"}\n')
    options = ["--text", tmp_path / "text.txt", "--lambada", tmp_path / "lambada.jsonl", "--window", "64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(sys, "argv", ["budget.py", *map(str, [model, *options, "--device", "cpu", "--out", tmp_path])])
        runpy.run_path(str(BENCHMARKS / "budget.py"), run_name="__main__")
        found = json.loads((tmp_path / f"budget_{model.name}.json").read_text())
        table = runpy.run_path(str(BENCHMARKS / "budget_table.py"))["table"](found)
    budgets = [row for row in found["rows"] if "against" in row]
    others = {row["recipe"]: row["compressed_bytes"] for row in found["rows"] if "against" not in row}
    assert set(others) == {row["against"] for row in budgets}
    assert all(row["compressed_bytes"] <= others[row["against"]] for row in budgets)
    assert len(table.splitlines()) == 6 + len(found["rows"])
