"""`benchmarks/compress.py` runs on a CPU with a small checkpoint, and hashes what it wrote."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compress as benchmark


def test_a_small_checkpoint_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = {}
    remove = benchmark.shutil.rmtree

    def keep_hashes(path: Path, ignore_errors: bool = False) -> None:
        if path.name == "out" and path.exists():
            files = sorted(path.glob("*.safetensors"))
            seen["sha256"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        remove(path, ignore_errors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.shutil, "rmtree", keep_hashes)
        benchmark.main(
            [
                *("--gigabytes", "0.01", "--folder", str(tmp_path / "disk"), "--recipe", "rtn", "--here"),
                *("--devices", "cpu", "--devices", "cpu", "--workers", "2", "--out", str(tmp_path / "result.json")),
            ]
        )
    result = json.loads((tmp_path / "result.json").read_text())
    first, second = result["runs"]
    assert first["tensors_sha256"] == second["tensors_sha256"] == seen["sha256"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert 5e6 < result["source_bytes"] < 3e7
    assert result["disk"]["read"] > 0
    assert result["disk"]["write"] > 0
    for run in (first, second):
        assert run["ratio"] == run["seconds"] / max(run["disk_s"], run["solve_s"])
        assert run["solve_s_per_billion"] == run["stages_s"]["solve"] / run["parameters"] * 1e9
        assert 0 < run["mean_error"] < 0.5
        assert run["peak_gpu_bytes"] == 0
    assert list((tmp_path / "disk").iterdir()) == []


def test_large_checkpoints_have_real_shapes() -> None:
    shapes, _ = benchmark.shapes_of(8)
    assert shapes["model.layers.2.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    nbytes = 2 * sum(benchmark.prod(shape) for shape in shapes.values())
    assert 8e9 < nbytes < 10e9
