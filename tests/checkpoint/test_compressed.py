"""The loader believes nothing: version, digest, every tensor's dtype and shape are checked before a weight is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import builders
import zoo
from milo.checkpoint.compressed import DIGEST_KEY, FORMAT_VERSION, CompressedCheckpoint, plan_from_config
from milo.checkpoint.source import Checkpoint, read_metadata
from milo.checkpoint.writer import UNFINISHED
from milo.errors import CheckpointError, FormatError, MiloError
from milo.plan.plan import Plan


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization_config in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def with_digest(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    """The same change by somebody who knows to recompute the digest."""

    def thorough(config: dict[str, Any]) -> None:
        change(config)
        config["plan_sha256"] = Plan.from_json(config["plan"]).digest

    return thorough


def other_ranks(config: dict[str, Any]) -> None:
    entry = next(e for e in config["plan"]["matrices"] if e["role"] == "attention")
    assert entry["ranks"] == "8x2"
    entry["ranks"] = "9x2"


def test_a_whole_folder_opens_and_every_matrix_is_close_to_its_source(
    compressed_folder: Path, mixtral_folder: Path
) -> None:
    out, source = CompressedCheckpoint(compressed_folder), Checkpoint(mixtral_folder)
    assert out.base_model is None
    errors = {m["name"]: m["error"] for m in out.report["matrices"]}
    for name, weight in builders.matrices(out):
        original = source.read(f"{name}.weight").float()
        error = ((weight - original).norm() / original.norm()).item()
        assert error == pytest.approx(errors[name], rel=1e-3)
        assert error < 0.2
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.0.block_sparse_moe.gate.weight"):
        assert torch.equal(out.read(name), source.read(name))
    assert {read_metadata(f)[DIGEST_KEY] for f in compressed_folder.glob("*.safetensors")} == {out.plan.digest}


def test_stacks_are_cut_into_their_members(tmp_path: Path) -> None:
    zoo.tiny_model("gpt_oss").save_pretrained(tmp_path / "m")
    builders.compress(tmp_path / "m", tmp_path / "out", ranks="kurtosis:5+dense:2", rounds=1)
    out, source = CompressedCheckpoint(tmp_path / "out"), Checkpoint(tmp_path / "m")
    errors = {(m["name"], m.get("member")): m["error"] for m in out.report["matrices"]}
    stacks = [row for row in out.plan.rows if row.kind == "stack"]
    assert len(stacks) == 4
    for row in stacks:
        assert row.transposed
        for member, original in enumerate(source.read(row.name).mT.float()):
            error = ((out.weight(row, member) - original).norm() / original.norm()).item()
            assert error == pytest.approx(errors[row.name, member], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(format_version=FORMAT_VERSION + 1),
            r"has format version 2, newer .*pip install -U milo-moe",
        ),
        (lambda c: c.update(format_version="1"), "has format version 1, newer than this MiLo reads"),
        (lambda c: c.pop("format_version"), "has format version None"),
        (lambda c: c.update(quant_method="gptq"), r"is not compressed with MiLo \(quant_method: gptq\)"),
        (lambda c: c.clear(), r"is not compressed with MiLo \(quant_method: None\)"),
        (other_ranks, "does not match its plan_sha256: config.json was edited or damaged"),
        (lambda c: c["plan"].update(rounds=3), "does not match its plan_sha256"),
        (lambda c: c.update(plan_sha256="0" * 64), "does not match its plan_sha256"),
        (lambda c: c.pop("plan_sha256"), "does not match its plan_sha256"),
        (lambda c: c.pop("plan"), "the plan in config.json is damaged"),
        (lambda c: c["plan"].pop("matrices"), "the plan in config.json is damaged"),
        (with_digest(other_ranks), r"model\S*\.safetensors belongs to another plan than .*config.json"),
    ],
)
def test_a_newer_format_and_a_tampered_plan_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, compressed_folder: Path, tmp_path: Path
) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "copy")
    edit(folder, change)
    with pytest.raises(FormatError, match=message):
        CompressedCheckpoint(folder)


def test_other_ranks_did_change_the_plan(compressed_folder: Path) -> None:
    config = json.loads((compressed_folder / "config.json").read_text())["quantization_config"]
    before = Plan.from_json(config["plan"])
    assert plan_from_config(config, "here") == before
    other_ranks(config)
    assert {r for row in Plan.from_json(config["plan"]).rows for r in row.ranks} - {
        r for row in before.rows for r in row.ranks
    } == {9}


def test_an_older_version_without_news_still_opens(compressed_folder: Path, tmp_path: Path) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "copy")
    edit(folder, lambda c: c.update(format_version=0))
    assert CompressedCheckpoint(folder).plan == CompressedCheckpoint(compressed_folder).plan


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], digest: str | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    metadata = {"format": "pt"} | ({DIGEST_KEY: digest} if digest else {})
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.lowrank_v"), rf"lacks {NAME}\.lowrank_v, which its plan promises"),
        (
            lambda t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"].float()}),
            rf"{NAME}\.weight_scale in .* is F32 .*, but the plan says TensorSpec\(dtype='F16'",
        ),
        (
            lambda t: t.update({f"{NAME}.weight_packed": t[f"{NAME}.weight_packed"][:-1].clone()}),
            rf"{NAME}\.weight_packed in .* is I32 \(63, 6\), but the plan says",
        ),
    ],
)
@pytest.mark.parametrize("keeps_digest", [True, False])
def test_tensors_that_are_not_what_the_plan_says_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    keeps_digest: bool,
    compressed_folder: Path,
    tmp_path: Path,
) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "copy")
    digest = CompressedCheckpoint(folder).plan.digest
    rewrite(folder, change, digest if keeps_digest else None)
    with pytest.raises(FormatError, match=message):
        CompressedCheckpoint(folder)


def test_a_shard_of_another_run_is_refused(mixtral_folder: Path, tmp_path: Path) -> None:
    """Equal shapes, other rounds: only the digest in the shard's header can tell."""
    for name, rounds in (("a", 1), ("b", 2)):
        builders.compress(mixtral_folder, tmp_path / name, ranks="uniform:2", rounds=rounds, max_shard_size=40_000)
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    shutil.copy(shards[1], tmp_path / "b" / shards[1].name)
    with pytest.raises(FormatError, match=rf"{shards[1].name} belongs to another plan than .*b/config\.json"):
        CompressedCheckpoint(tmp_path / "b")


def test_leftovers_are_refused_whatever_they_look_like(compressed_folder: Path, tmp_path: Path) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "copy")
    (folder / UNFINISHED).write_text("{}")
    with pytest.raises(CheckpointError, match="is an unfinished compression; run the same `milo quantize` again"):
        CompressedCheckpoint(folder)
    (folder / UNFINISHED).unlink()
    CompressedCheckpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        CompressedCheckpoint(folder)


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_what_is_no_folder_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        CompressedCheckpoint(tmp_path / folder)


def test_an_ordinary_model_is_no_compressed_one(mixtral_folder: Path) -> None:
    with pytest.raises(FormatError, match="is not compressed with MiLo"):
        CompressedCheckpoint(mixtral_folder)
    assert issubclass(FormatError, MiloError)
