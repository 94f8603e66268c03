"""`benchmarks/solver.py` and `budget_time.py` run, on small shapes and a CPU, and say what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import builders

ROOT = Path(__file__).resolve().parents[2]


def test_the_solver_benchmark_runs_on_small_shapes(tmp_path: Path) -> None:
    out = tmp_path / "solver.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "solver.py"), "--tiny", "--device", "cpu", "--rounds", "2"]
    environment = {**builders.child_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    for model in ("mixtral", "deepseek"):
        assert result[model]["seconds"]["milo-s2"] > 0
        assert result[model]["expert_rank_sum"] > 0
        error = result[model]["mean_relative_error"]
        assert 0.05 < error["milo-s2"] < error["hqq"] < 0.3
    for case in result["official"]["errors_before_factor_rounding"]:
        assert case["ours"] < case["official"]


def test_a_budget_is_timed_beside_milo_s2(tmp_path: Path) -> None:
    out = tmp_path / "time.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "budget_time.py"),
        "--tiny",
        "--device",
        "cpu",
        "--layers",
        "2",
    ]
    environment = {**builders.child_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert 3.0 < result["bits_per_weight"] <= 3.55
