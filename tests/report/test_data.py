"""The report's numbers are the folder's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import builders
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.errors import CheckpointError
from milo.report import evaluation
from milo.report.colour import THEMES, Scale, paint, ramp
from milo.report.data import ReportData, gather
from milo.report.maps import expert_maps, single_map
from report.conftest import EVALUATION


def test_bytes_by_role_are_the_files_tensors(compressed_folder: Path) -> None:
    checkpoint = CompressedCheckpoint(compressed_folder)
    data = gather(checkpoint)
    assert data.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())
    compressed = [role for role in data.roles if role.matrices]
    assert sum(role.nbytes for role in compressed) == checkpoint.plan.nbytes
    assert sum(role.matrices for role in compressed) == len(data.matrices)
    lowrank = sum(info.nbytes for name, info in checkpoint.tensors.items() if "lowrank" in name)
    assert sum(role.parts["compensators"] for role in data.roles) == lowrank > 0


def test_every_cell_is_the_reports_matrix(compressed_folder: Path) -> None:
    data = gather(CompressedCheckpoint(compressed_folder))
    written = {m["name"]: m for m in json.loads((compressed_folder / "milo_report.json").read_text())["matrices"]}
    seen = 0
    for found in expert_maps(data):
        for i, layer in enumerate(found.layers):
            for j in range(len(found.columns)):
                name = found.templates[0].replace("{}", str(layer)).replace("*", str(j))
                assert found.error[i, j] == written[name]["error"]
                assert found.rank[i, j] == written[name]["rank"]
                seen += 1
    singles = single_map(data)
    assert singles is not None
    for i, template in enumerate(singles.templates):
        for j, layer in enumerate(singles.layers):
            assert singles.error[i, j] == written[template.replace("{}", str(layer))]["error"]
            seen += 1
    assert seen == len(written)
    assert [m.error for m in data.worst(3)] == sorted((m["error"] for m in written.values()), reverse=True)[:3]


def test_a_damaged_report_is_named(compressed_folder: Path, tmp_path: Path) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "folder")
    builders.edit_json(folder / "milo_report.json", matrices=[{"name": "x"}])
    with pytest.raises(CheckpointError, match=r"milo_report\.json is damaged"):
        gather(CompressedCheckpoint(folder))


def test_stacks_have_a_column_for_every_member_and_unknown_errors_stay_unknown(fused: ReportData) -> None:
    maps = expert_maps(fused)
    assert {found.title for found in maps} == {"gate_up_proj", "down_proj"}
    assert all(found.error.shape == (2, 4) and np.isnan(found.error).all() for found in maps)
    assert fused.errors.size == 0
    assert fused.worst() == []


@pytest.mark.parametrize("quantity", ["error", "rank"])
@pytest.mark.parametrize("theme", THEMES)
def test_lightness_alone_orders_the_colours(quantity: str, theme: str) -> None:
    linear = (ramp(quantity, theme).astype(np.float64) / 255) ** 2.2
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    steps = np.diff(np.cbrt(luminance)) * (1 if theme == "dark" else -1)
    assert (steps > -2e-3).all()  # 8-bit rounding
    assert steps.sum() > 0.45


def test_a_scale_is_not_ruined_by_one_bad_matrix_and_says_so() -> None:
    values = np.append(np.linspace(0.1, 0.2, 1000), 5.0)
    scale = Scale.of("error", values)
    assert scale.high < 0.21
    assert scale.ticks()[-1][1].startswith("≥ ")
    painted = paint(scale, np.array([[0.1, np.nan, 5.0]]), "light")
    assert painted[0, :, 3].tolist() == [255, 0, 255]
    assert (painted[0, 2, :3] == ramp("error", "light")[-1]).all()


def test_equal_values_have_a_scale_too() -> None:
    for quantity in ("error", "rank"):
        scale = Scale.of(quantity, np.array([3.0, 3.0]))
        assert np.isfinite(scale.position(np.array([3.0]))).all()


def test_an_evaluation_shows_what_it_knows_and_what_is_simple() -> None:
    rows = dict(evaluation.measurements(EVALUATION).rows)
    assert rows["KL divergence from the original, nats a token"] == "0.03000 ± 0.00100"
    assert rows["Same first choice as the original"] == "87.00 %"
    others = {table.title: table for table in evaluation.others(EVALUATION)}
    assert set(others) == {"Also recorded", "router agreement", "probes"}
    assert list(others["probes"].rows[0]) == ["piqa", "0.61", "0.011"]
    assert list(others["router agreement"].head) == ["layer", "same top k"]


def test_an_evaluation_shows_tasks_and_routers() -> None:
    row = {"task": "piqa", "part_of": None, "metric": "acc", "value": 0.6, "stderr": 0.01, "original": 0.62}
    part = {**row, "task": "mmlu_law", "part_of": "mmlu"}
    routing = [{"layer": "layers.0", "same_set": 0.9}, {"layer": "layers.1", "same_set": 0.5}]
    found = {"tasks": {"results": [row, part]}, "divergence": {"routing": routing}, "text": "wiki.txt"}
    scores, *more = evaluation.others(found)
    assert scores.rows == [("piqa, acc", "0.6000 ± 0.0100", "0.6200", "–")]
    assert more == []
    assert evaluation.measurements(found).rows == [
        ("Tokens that keep all their experts, mean of layers", "70.00 %"),
        ("… in layers.1, the worst", "50.00 %"),
    ]


def test_an_evaluation_of_another_kind_is_no_error() -> None:
    assert evaluation.measurements({"divergence": None}) is None
    assert evaluation.tasks({"tasks": {"results": [3, {"task": "piqa"}]}}) is None
    assert evaluation.others({"contiguous": 3, "notes": [1, 2], "empty": {}}) == []
    assert evaluation.headline({}) is None
