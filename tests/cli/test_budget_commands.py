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


def test_frontier_draws_every_recipe_and_budget(model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    args = ("--text", text, "--window", "64", "--budgets", "1bpw,4.3bpw,5.5bpw")
    done = milo("frontier", model, "-o", tmp_path / "f", *args)
    shown = done.stdout
    assert "1bpw is left out" in done.stderr
    found = json.loads((tmp_path / "f/frontier.json").read_text())
    points = {point["recipe"]: point for point in found["points"]}
    assert list(points) == ["rtn", "hqq", "milo-s1", "milo-s2", "4.3bpw", "5.5bpw"]
    assert points["4.3bpw"]["bits_per_weight"] <= 4.3 < points["5.5bpw"]["bits_per_weight"] <= 5.5
    assert points["5.5bpw"]["kl"] < points["4.3bpw"]["kl"]
    assert all(point["recipe"] in shown for point in found["points"])
    assert (tmp_path / "f/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["frontier.json", "frontier.png"]
