"""The format fits in 60 lines of numpy, and those lines see the same weights as MiLo's own loader.

`numpy_reader.py` shares no code with the package: it parses safetensors headers, the plan's run lengths and
layer ranges, planes, compact scales and zeros, factors and stacks by itself. So a change of the format that
is not in `docs/format.md` fails here.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import numpy_reader
import pytest

import builders
import zoo
from milo.checkpoint.compressed import CompressedCheckpoint

ENCODINGS: dict[str, dict[str, Any]] = {
    "3-bit": {},
    "2-bit g32": {"bits": 2, "group_size": 32},
    "4-bit g128": {"bits": 4, "group_size": 128},
    "5-bit": {"bits": 5},
    "6-bit in two planes": {"bits": 6},
    "8-bit in two planes": {"bits": 8, "group_size": 32},
    "8-bit scales and zeros": {"scale_bits": 8, "zero_bits": 8},
    "6-bit scales and zeros": {"scale_bits": 6, "zero_bits": 6, "group_size": 32},
    "6-bit zeros of 4-bit codes": {"bits": 4, "zero_bits": 6},
    "int8 factors": {"factor": "int8"},
    "fp16 factors": {"factor": "fp16"},
    "no factors": {"ranks": "none"},
    "odd ranks": {"ranks": "dense:17+kurtosis:3"},
}


def check(folder: Path) -> None:
    """Both readers give the same names and, within float32 rounding, the same numbers."""
    ours = dict(builders.matrices(CompressedCheckpoint(folder)))
    theirs = numpy_reader.load(folder)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        expected = weight.numpy()
        assert theirs[name].dtype == np.float32
        np.testing.assert_allclose(theirs[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=name)


def test_the_reader_has_at_most_60_lines_and_imports_numpy_only() -> None:
    source = Path(numpy_reader.__file__).read_text()
    assert len(source.splitlines()) <= 60
    assert max(map(len, source.splitlines())) <= 110
    nodes = list(ast.walk(ast.parse(source)))
    assert not any(isinstance(node, ast.ImportFrom) for node in nodes)
    assert {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} == {
        "json",
        "numpy",
    }


@pytest.mark.parametrize("name", ENCODINGS)
def test_it_rebuilds_every_matrix_of_a_model_of_separate_experts(
    name: str, mixtral_folder: Path, tmp_path: Path
) -> None:
    knobs = {"ranks": "dense:8+kurtosis:3", "rounds": 1, **ENCODINGS[name]}
    builders.compress(mixtral_folder, tmp_path / "out", max_shard_size=30_000, **knobs)
    check(tmp_path / "out")


@pytest.mark.parametrize("knobs", [{}, {"bits": 8, "scale_bits": 6, "zero_bits": 8, "factor": "int8"}])
def test_it_rebuilds_stacks_with_ranks_that_differ_from_expert_to_expert(knobs: dict[str, Any], tmp_path: Path) -> None:
    zoo.tiny_model("gpt_oss").save_pretrained(tmp_path / "source")
    plan = builders.compress(tmp_path / "source", tmp_path / "out", ranks="dense:4+kurtosis:5", rounds=1, **knobs)
    stacks = [row for row in plan.rows if row.kind == "stack"]
    assert any(len(set(row.ranks)) > 1 for row in stacks)
    check(tmp_path / "out")


def test_it_rebuilds_a_layout_that_transformers_has_no_class_for(tmp_path: Path) -> None:
    shapes, config = builders.deepseek_v1()
    builders.write_checkpoint(tmp_path / "source", builders.random_tensors(shapes), config)
    builders.compress(tmp_path / "source", tmp_path / "out", ranks="uniform:2", rounds=1)
    check(tmp_path / "out")
