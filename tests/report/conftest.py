"""Reports to look at: of a real compression on disk, and of plans as large as any model's, without weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import builders
from milo.checkpoint.inventory import Placement, take_inventory
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import custom_recipe
from milo.report.data import ReportData, gather

EVALUATION = {
    "model": "out",
    "text": "a <text>.txt",
    "recipe": "milo-s1",
    "size": {"tensor_bytes": 1},
    "contiguous": {"ppl": 12.5, "nll": 2.5, "tokens": 4096, "window": 512, "stride": 512},
    "sliding": {"ppl": 11.5, "nll": 2.4, "tokens": 4096, "window": 512, "stride": 128},
    "original": "source",
    "divergence": {"kl": 0.03, "kl_se": 0.001, "kl_p50": 0.02, "kl_p90": 0.06, "kl_p99": 0.17, "top1": 0.87},
    "router_agreement": [{"layer": 0, "same_top_k": 0.97}, {"layer": 1, "same_top_k": 0.93}],
    "probes": {"piqa": {"acc": 0.61, "acc_stderr": 0.011}, "arc_easy": {"acc": 0.4, "acc_stderr": 0.01}},
    "harness": "0.4.9",
    "samples": {"deep": {"deeper": {"deepest": 1}}},
}


@pytest.fixture(scope="session")
def large() -> ReportData:
    """61 layers of 256 experts: as many matrices as the largest open models have."""
    shapes, config = builders.deepseek_v1(layers=61, hidden=64, inter=32, experts=256, dense=128)
    return _imagined(shapes, config)


@pytest.fixture(scope="session")
def fused() -> ReportData:
    """Experts as stacks, without an error report."""
    shapes = {
        f"model.layers.{i}.mlp.experts.{name}": (4, *shape)
        for i in range(2)
        for name, shape in (("gate_up_proj", (64, 64)), ("down_proj", (64, 32)))
    }
    return _imagined(shapes, {"model_type": "any", "hidden_size": 64}, known=False)


def _imagined(shapes: builders.Shapes, config: dict[str, Any], known: bool = True) -> ReportData:
    fused = [name for name, shape in shapes.items() if len(shape) == 3]
    stacks = {name: Placement("experts", name, "Experts", "experts") for name in fused}
    inventory = take_inventory(builders.heads(shapes), config, stacks or None)
    generator = np.random.default_rng(0)
    recipe = custom_recipe("milo-s2", config, ranks="dense:h/4+kurtosis:h/16")
    evidence = Evidence(lambda group: generator.gamma(1.5, 1.0, group.count).tolist())
    plan = make_plan(inventory, recipe, config, evidence)
    matrices = [
        {"name": row.name.replace("*", str(i)), "error": 0.19 * (1 - rank / 100) + 0.002 * generator.standard_normal()}
        for row in plan.rows
        for i, rank in enumerate(row.ranks)
    ]
    # What `gather` asks of a checkpoint; a folder of this size would be gigabytes.
    checkpoint = SimpleNamespace(
        plan=plan,
        tensors={},
        base_model="someone/large <model>",
        evaluation=None,
        report={"matrices": matrices} if known else {},
        has_report=known,
        folder=Path("nowhere"),
    )
    return gather(checkpoint)  # type: ignore[arg-type]
