"""`--budget` and `milo frontier` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_app import milo, model, text  # noqa: F401


def test_plan_explains_a_budget_and_quantize_keeps_it(model: Path, tmp_path: Path) -> None:  # noqa: F811
    shown = milo("plan", model, "--budget", "4.9bpw", "--sensitivity", "structure").stdout
    assert "the price of a byte" in shown
    assert "model.layers.#.block_sparse_moe.experts.*.w1" in shown
    plan = json.loads(milo("plan", model, "--budget", "4.9bpw", "--json").stdout)
    assert plan["bits_per_weight"] <= 4.9
    assert plan["allocation"]["nbytes"] == plan["compressed_bytes"]
    assert plan["recipe"] == "budget"
    milo("quantize", model, "-o", tmp_path / "out", "--budget", "4.9bpw", "--self-calibrate")
    found = json.loads(milo("inspect", tmp_path / "out", "--json").stdout)
    assert found["bits_per_weight"] <= 4.9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--budget", "4.9bpw", "--bits", "4"), "leave out --bits"),
        (("--budget", "4.9bpw", "--recipe", "hqq"), "leave out --recipe"),
        (("--budget", "a lot"), "is no budget"),
        (("--budget", "4.9bpw", "--sensitivity", "gut"), "unknown sensitivity"),
        (("--budget", "1bpw", "--sensitivity", "structure"), "too small"),
    ],
)
def test_what_makes_no_sense_is_refused(model: Path, args: tuple[str, ...], message: str) -> None:  # noqa: F811
    assert message in milo("plan", model, *args, code=1).stderr
