"""From a folder and a budget to a compressed folder: measured errors are the stored ones, bytes are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import builders
import milo
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.errors import PlanError, WeightError
from milo.integrations.transformers.source import open_source
from milo.pipeline.budget import folder_overhead, plan_budget
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.measure_menu import measure_menu
from milo.pipeline.planning import Source
from milo.plan.budget import Budget
from milo.plan.menu import MENU, Measured
from milo.plan.sensitivity import Sensitivities, structural


@pytest.fixture(scope="module")
def source(mixtral_folder: Path) -> Source:
    return open_source(str(mixtral_folder))


@pytest.fixture(scope="module")
def measured(source: Source) -> dict[str, Measured]:
    return measure_menu(source)


def carry_out(source: Source, measured: dict[str, Measured], budget: str, out: Path) -> CompressedCheckpoint:
    known = structural(source.inventory.candidates)
    found = plan_budget(source, Budget.parse(budget), measured, known, "structure")
    compress_checkpoint(source.checkpoint, source.inventory, found.plan, out)
    return CompressedCheckpoint(out)


def test_measured_errors_are_those_of_the_stored_matrices(
    source: Source, measured: dict[str, Measured], tmp_path: Path
) -> None:
    checkpoint = carry_out(source, measured, "4.6bpw", tmp_path / "out")
    assert len({row.encoding for row in checkpoint.plan.rows}) > 1
    for group in source.inventory.groups:
        row = checkpoint.plan.by_name[group.name]
        errors = measured[group.name].errors[row.encoding]
        for member, tensor in enumerate(group.members):
            weight = source.checkpoint.read(tensor).float()
            error = (checkpoint.weight(row, member) - weight).double().square().sum().item()
            assert errors[member][0] == pytest.approx(error, rel=1e-3)


def test_finer_options_have_smaller_errors(measured: dict[str, Measured]) -> None:
    for name, found in measured.items():
        assert list(found.errors) == [encoding for encoding in MENU if name != "lm_head" or encoding.bits >= 6]
        relative = [found.relative(encoding, [0] * len(members)) for encoding, members in found.errors.items()]
        assert relative == sorted(relative, reverse=True)
        assert 0.01 < relative[0] < 0.05 or name == "lm_head"


@pytest.mark.parametrize("spare", [0, 9_000])
def test_a_folder_budget_holds_for_every_file(
    source: Source, measured: dict[str, Measured], tmp_path: Path, spare: int
) -> None:
    known = structural(source.inventory.candidates)
    smallest = plan_budget(source, Budget.parse("4.1bpw"), measured, known, "structure").plan
    compress_checkpoint(source.checkpoint, source.inventory, smallest, tmp_path / "small")
    size = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    budget = size + 40_000 + spare
    carry_out(source, measured, f"{budget}B", tmp_path / "out")
    files = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert budget - 45_000 < files <= budget


def test_what_cannot_be_met_is_said(source: Source, measured: dict[str, Measured]) -> None:
    known = structural(source.inventory.candidates)
    for budget in ("2.5bpw", "10KB"):
        with pytest.raises(PlanError, match="too small"):
            plan_budget(source, Budget.parse(budget), measured, known, "structure")


def test_a_low_rank_matrix_is_offered_rank_and_noise_is_not(tmp_path: Path) -> None:
    shapes, config = builders.mixtral(hidden=128, inter=160)
    tensors = builders.random_tensors(shapes)
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    generator = torch.Generator().manual_seed(1)
    thin = torch.randn(128, 4, generator=generator) @ torch.randn(4, 160, generator=generator)
    tensors[name] = (tensors[name].float() * 0.2 + 0.05 * thin).bfloat16()
    source = open_source(str(builders.write_checkpoint(tmp_path / "source", tensors, config)))
    measured = measure_menu(source)
    offered = {
        (name, member)
        for name, found in measured.items()
        for member, by_rank in enumerate(found.errors.get(MENU[0], []))
        if len(by_rank) > 1
    }
    assert offered == {("model.layers.0.block_sparse_moe.experts.*.w2", 2)}
    by_rank = measured["model.layers.0.block_sparse_moe.experts.*.w2"].errors[MENU[0]][2]
    assert by_rank[8] < 0.2 * by_rank[0]
    # A sensitive matrix gets the rank that was measured, and the folder holds it.
    costs = structural(source.inventory.candidates).costs
    sensitivities = Sensitivities({**costs, "model.layers.0.block_sparse_moe.experts.*.w2": 50.0})
    found = plan_budget(source, Budget.parse("3.5bpw"), measured, sensitivities, "structure", rounds=4)
    ranks = found.plan.by_name["model.layers.0.block_sparse_moe.experts.*.w2"].ranks
    assert ranks[2] > 0
    assert ranks[0] == ranks[1] == ranks[3] == 0


def test_a_damaged_weight_is_named(source: Source, tmp_path: Path) -> None:
    shapes, config = builders.mixtral()
    tensors = builders.random_tensors(shapes)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 3] = torch.nan
    damaged = open_source(str(builders.write_checkpoint(tmp_path / "source", tensors, config)))
    with pytest.raises(WeightError, match=r"layers\.1\.self_attn\.q_proj"):
        measure_menu(damaged, menu=MENU[:1])


def test_a_plan_of_mixed_encodings_loads_with_every_other_field_unchanged(
    source: Source, measured: dict[str, Measured]
) -> None:
    known = structural(source.inventory.candidates)
    plans = [plan_budget(source, Budget.parse("4.6bpw"), measured, known, "structure").plan for _ in range(2)]
    assert plans[0].digest == plans[1].digest
    assert replace(plans[0], policy="x").digest != plans[0].digest
    assert "structure sensitivities" in plans[0].policy


def test_an_untied_head_pays_into_a_folder_budget(
    source: Source, measured: dict[str, Measured], tmp_path: Path
) -> None:
    known = structural(source.inventory.candidates)
    head = source.inventory.head
    assert head is not None
    assert head.name == "lm_head"
    assert {encoding.bits for encoding in measured["lm_head"].errors} == {6, 8}
    assert "lm_head" not in plan_budget(source, Budget.parse("4.1bpw"), measured, known, "structure").plan.by_name
    assert "lm_head" not in plan_budget(source, Budget.parse("1GB"), measured, known, "structure").plan.by_name
    small = plan_budget(source, Budget.parse("4.1bpw"), measured, known, "structure").plan
    nbytes = small.nbytes + folder_overhead(source, small)
    found = plan_budget(source, Budget.parse(f"{nbytes}B"), measured, known, "structure")
    assert found.plan.by_name["lm_head"].encoding.bits in (6, 8)
    out = tmp_path / "out"
    compress_checkpoint(source.checkpoint, source.inventory, found.plan, out)
    assert sum(path.stat().st_size for path in out.iterdir()) <= nbytes
    checkpoint = CompressedCheckpoint(out)
    assert milo.__version__  # transformers knows compressed folders once it is imported
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    x = torch.randn(3, head.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x @ checkpoint.weight(checkpoint.plan.by_name["lm_head"], 0).float().T
    torch.testing.assert_close(model.lm_head(x), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert CompressedCheckpoint(tmp_path / "again").plan.digest == found.plan.digest


def test_a_tied_head_is_left_alone(tmp_path: Path) -> None:
    shapes, config = builders.mixtral()
    folder = builders.write_checkpoint(
        tmp_path / "source", builders.random_tensors(shapes), config | {"tie_word_embeddings": True}
    )
    assert open_source(str(folder)).inventory.head is None
