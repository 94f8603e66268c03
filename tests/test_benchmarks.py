"""The benchmark scripts run from end to end at toy size; their figures mean something on a GPU only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_generate(tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    options = ["--shape", "tiny", "--layers", "1", "--device", "cpu", "--steps", "2", "--batch", "1", "--out", str(out)]
    subprocess.run([sys.executable, str(BENCHMARKS / "generate.py"), *options], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["left_to_reference"] == {}
    assert all(found["rows"][0][f"{variant}_ms"] > 0 for variant in ("kernels", "reference", "bf16"))
    assert found["reference_bytes"] < found["bf16_bytes"]
