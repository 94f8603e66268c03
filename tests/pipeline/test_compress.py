"""The pipeline: bytes on disk are the plan's arithmetic to the byte, runs repeat bit for bit, failures leave nothing.

"Nothing" means nothing that looks finished: an input that is broken before the first tensor leaves no folder at all,
one that fails on the way leaves no `config.json`, and the same command then starts over without being asked.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import builders
import damage
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.source import Checkpoint, read_header
from milo.checkpoint.writer import UNFINISHED, TensorWriter
from milo.errors import CheckpointError, MiloError, WeightError
from milo.format.matrix import DTYPE_BYTES, TensorSpec
from milo.integrations.transformers.source import open_source
from milo.pipeline import compress, job, work
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.layout import lay_out_checkpoint
from milo.pipeline.planning import peak_bytes, plan_source
from milo.plan.recipe import custom_recipe

KNOBS: dict[str, Any] = {"ranks": "dense:5+kurtosis:3", "rounds": 2}


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 30_000, 1])
@pytest.mark.parametrize("encoding", [{}, {"bits": 8, "scale_bits": 6, "zero_bits": 8, "factor": "int8"}])
def test_bytes_on_disk_are_the_plans_exact_arithmetic(
    max_shard_size: int, encoding: dict[str, Any], mixtral_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = open_source(str(mixtral_folder))
    plan = plan_source(source, custom_recipe("milo-s1", source.checkpoint.config, **KNOBS, **encoding))
    shards = lay_out_checkpoint(source.checkpoint, source.inventory, plan, max_shard_size)
    compress_checkpoint(source.checkpoint, source.inventory, plan, out, max_shard_size=max_shard_size)

    promised = dict(plan.tensors())
    files = sorted(out.glob("*.safetensors"))
    stored = {info.name: info for file in files for info in read_header(file)}
    of_matrices = {name: info for name, info in stored.items() if name in promised}
    assert {n: TensorSpec(i.dtype, i.shape) for n, i in of_matrices.items()} == promised
    assert sum(info.nbytes for info in of_matrices.values()) == plan.nbytes
    assert sum(DTYPE_BYTES[s.dtype] * math.prod(s.shape) for s in promised.values()) == plan.nbytes
    # Everything else is copied, and files hold headers and tensors and not one byte more.
    left = stored.keys() - promised.keys()
    assert left == source.inventory.left.keys()
    assert all(stored[name].nbytes == source.checkpoint.tensors[name].nbytes for name in left)
    assert {f.name: f.stat().st_size for f in files} == {shard.file: shard.nbytes for shard in shards}
    report = json.loads((out / "milo_report.json").read_text())
    assert report["compressed_bytes"] == plan.nbytes
    assert report["files_bytes"] == sum(f.stat().st_size for f in files)
    assert report["bits_per_weight"] == 8 * plan.nbytes / report["compressed_weights"]


def test_tensors_of_one_matrix_share_a_shard_and_shards_keep_their_size(mixtral_folder: Path, tmp_path: Path) -> None:
    builders.compress(mixtral_folder, tmp_path / "out", max_shard_size=30_000, **KNOBS)
    out = CompressedCheckpoint(tmp_path / "out")
    files = {info.file for info in out.tensors.values()}
    assert len(files) >= 5
    for row in out.plan.rows:
        for matrix in row.matrices():
            assert len({i.file for name, i in out.tensors.items() if name.startswith(matrix + ".")}) == 1
    for file in files:
        assert sum(info.nbytes for info in out.tensors.values() if info.file == file) <= 30_000


def test_shards_change_nothing_but_the_files(mixtral_folder: Path, tmp_path: Path) -> None:
    builders.compress(mixtral_folder, tmp_path / "one", **KNOBS)
    builders.compress(mixtral_folder, tmp_path / "many", max_shard_size=30_000, **KNOBS)
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_two_runs_give_the_same_files(mixtral_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        builders.compress(mixtral_folder, tmp_path / name, max_shard_size=60_000, **KNOBS)
    hashes = builders.file_hashes(tmp_path / "a")
    assert hashes == builders.file_hashes(tmp_path / "b")
    assert len(hashes) >= 7  # shards, index, config, report, card, tokenizer


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_cores_gives_the_same_files(workers: int, mixtral_folder: Path, tmp_path: Path) -> None:
    builders.compress(mixtral_folder, tmp_path / "a", **KNOBS)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        builders.compress(mixtral_folder, tmp_path / "b", workers=workers, **KNOBS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert builders.file_hashes(tmp_path / "a") == builders.file_hashes(tmp_path / "b")


def test_the_size_of_a_piece_bounds_a_batch_and_hardly_touches_the_result(
    mixtral_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.compress(mixtral_folder, tmp_path / "whole", **KNOBS)
    monkeypatch.setitem(work.PIECE, "cpu", 3 * 96 * 64)  # three experts at a time, one matrix at least
    builders.compress(mixtral_folder, tmp_path / "pieces", **KNOBS)
    whole, parts = (CompressedCheckpoint(tmp_path / name) for name in ("whole", "pieces"))
    row = whole.plan.by_name["model.layers.0.block_sparse_moe.experts.*.w1"]
    assert list(work.pieces(row)) == [range(3), range(3, 4)]
    for a, b in zip(whole.report["matrices"], parts.report["matrices"], strict=True):
        assert a["error"] == pytest.approx(b["error"], rel=2e-2)


def test_peak_memory_is_told_from_the_plan(mixtral_folder: Path) -> None:
    source = open_source(str(mixtral_folder))
    plan = plan_source(source, custom_recipe("hqq", source.checkpoint.config))
    assert peak_bytes(plan) == work.worker_count("cpu") * 4 * 96 * 64 * 4 * work.COPIES
    assert source.sixteen_bit_bytes == 2 * plan.parameters


def test_safetensors_and_transformers_read_the_output(compressed_folder: Path) -> None:
    with safe_open(compressed_folder / "model.safetensors", framework="np") as shard:
        assert shard.get_tensor("model.layers.0.self_attn.q_proj.weight_packed").shape == (64, 6)
        assert shard.metadata()["format"] == "pt"
    model, info = AutoModelForCausalLM.from_pretrained(compressed_folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_side_files_come_along_and_the_card_says_how_to_load(mixtral_folder: Path, tmp_path: Path) -> None:
    source = builders.copied(mixtral_folder, tmp_path / "source")
    for name in ("generation_config.json", "merges.txt", "modeling_x.py", "LICENSE", ".hidden", "flax_model.msgpack"):
        (source / name).write_text("{}")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "README.md").write_text("the original's card")
    builders.compress(source, tmp_path / "out", **KNOBS)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "LICENSE", "merges.txt", "milo_report.json", "model.safetensors",
        "modeling_x.py", "README.md", "tokenizer.json",
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import milo" in card
    assert "pip install milo-moe" in card
    assert "the original's card" not in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "import milo" in config["quantization_config"]["note"]
    assert {k: v for k, v in config.items() if k != "quantization_config"} == Checkpoint(source).config


def test_the_report_has_every_matrix(compressed_folder: Path) -> None:
    out = CompressedCheckpoint(compressed_folder)
    assert len(out.report["matrices"]) == 8 + 24
    by_name = {entry["name"]: entry for entry in out.report["matrices"]}
    assert by_name.keys() == {name for name, _ in builders.matrices(out)}
    row = out.plan.by_name["model.layers.1.block_sparse_moe.experts.*.w2"]
    for i, rank in enumerate(row.ranks):
        entry = by_name[row.matrices()[i]]
        assert (entry["rank"], entry["bits"], entry["role"], entry["shape"]) == (rank, 3, "expert", [64, 96])
        assert 0 < entry["error"] < 0.3


def test_deepseek_moes_first_layout_is_compressed_from_names_alone(tmp_path: Path) -> None:
    """No class in transformers, and remote code is never run: headers and config are all there is."""
    shapes, config = builders.deepseek_v1()
    builders.write_checkpoint(tmp_path / "v1", builders.random_tensors(shapes), config, shards=2)
    (tmp_path / "v1" / "modeling_deepseek.py").write_text("raise RuntimeError('remote code was run')")
    plan = builders.compress(tmp_path / "v1", tmp_path / "out", ranks="dense:9+sparse:4", rounds=3)
    assert {str(row.role) for row in plan.rows} == {"attention", "dense_ffn", "shared_expert", "expert"}
    source, out = Checkpoint(tmp_path / "v1"), CompressedCheckpoint(tmp_path / "out")
    rebuilt = dict(builders.matrices(out))
    assert len(rebuilt) == 12 + 3 + 6 + 36
    for name, weight in rebuilt.items():
        original = source.read(f"{name}.weight").float()
        assert weight.shape == original.shape
        assert (weight - original).norm() < 0.2 * original.norm()


def test_progress_counts_weights_up_to_all_of_them(mixtral_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(mixtral_folder))
    plan = plan_source(source, custom_recipe("hqq", source.checkpoint.config))
    seen: list[tuple[int, int, str]] = []
    compress_checkpoint(
        source.checkpoint, source.inventory, plan, tmp_path / "out", progress=lambda *step: seen.append(step)
    )
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    assert seen[0][0] == 0
    assert seen[-1][:2] == (plan.parameters, plan.parameters)
    assert {step[2] for step in seen} == {"", *plan.by_name}


@pytest.mark.parametrize("ranks", ["dense:2", "kurtosis:2"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_name_the_tensor_and_leave_no_config(
    ranks: str, value: float, mixtral_folder: Path, tmp_path: Path
) -> None:
    source = builders.copied(mixtral_folder, tmp_path / "source")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    file = Checkpoint(source).tensors[name].file
    tensors = load_file(file)
    tensors[name][5, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        WeightError, match=r"layers\.1\.block_sparse_moe\.experts\.\*\.w1 \(member 3.*NaN or Inf.*damaged"
    ):
        builders.compress(source, tmp_path / "out", ranks=ranks, rounds=1)
    assert not (tmp_path / "out" / "config.json").exists()
    if ranks == "dense:2":  # the kurtosis policy sees it while planning, before a folder is made
        with pytest.raises(CheckpointError, match="unfinished"):
            CompressedCheckpoint(tmp_path / "out")
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("harm", [*damage.OF_FILES, *damage.OF_CONTENT], ids=lambda harm: harm.__name__)
def test_broken_input_is_refused_before_anything_is_written(
    harm: damage.Damage, mixtral_folder: Path, tmp_path: Path
) -> None:
    source = harm(builders.copied(mixtral_folder, tmp_path / "copy"))
    with pytest.raises(MiloError, match=(damage.OF_FILES | damage.OF_CONTENT)[harm]):
        builders.compress(source, tmp_path / "out", **KNOBS)
    assert not (tmp_path / "out").exists()


def test_the_output_must_be_empty_unless_told_otherwise(mixtral_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    builders.compress(mixtral_folder, out, **KNOBS)
    before = builders.file_hashes(out)
    with pytest.raises(CheckpointError, match=r"out is not empty; choose another output folder or pass --overwrite"):
        builders.compress(mixtral_folder, out, "hqq")
    assert builders.file_hashes(out) == before
    builders.compress(mixtral_folder, out, "hqq", overwrite=True, max_shard_size=30_000)
    assert CompressedCheckpoint(out).plan.recipe == "hqq"
    builders.compress(mixtral_folder, out, overwrite=True, **KNOBS)
    assert builders.file_hashes(out) == before


def test_the_source_is_never_the_output(mixtral_folder: Path, tmp_path: Path) -> None:
    source = builders.copied(mixtral_folder, tmp_path / "source")
    before = builders.file_hashes(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(CheckpointError, match="is the source itself; choose another output folder"):
            builders.compress(source, out, "hqq", overwrite=True)
    assert builders.file_hashes(source) == before


@pytest.mark.parametrize("where", ["allocating", "writing", "side files", "known before"])
def test_a_full_disk_is_explained_and_the_same_command_finishes_later(
    where: str, mixtral_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if where == "allocating":
            patch.setattr("os.posix_fallocate", full)
        elif where == "writing":
            write, put = TensorWriter.write, TensorWriter._put

            def fail_late(self: TensorWriter, name: str, tensor: torch.Tensor, first_row: int = 0) -> memoryview:
                if name.startswith("model.layers.1.self_attn.v_proj"):
                    patch.setattr(TensorWriter, "_put", full)
                return write(self, name, tensor, first_row)

            patch.setattr(TensorWriter, "write", fail_late)
            assert TensorWriter._put is put
        elif where == "side files":
            patch.setattr(compress.shutil, "copyfile", full)
        else:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        message = "out needs .* 1 free" if where == "known before" else "the disk of .*out is full; free some space"
        with pytest.raises(CheckpointError, match=message):
            builders.compress(mixtral_folder, out, **KNOBS)
    assert not (out / "config.json").exists()
    assert (out / UNFINISHED).exists() == (where != "known before")
    builders.compress(mixtral_folder, out, **KNOBS)
    builders.compress(mixtral_folder, tmp_path / "undisturbed", **KNOBS)
    assert builders.file_hashes(out) == builders.file_hashes(tmp_path / "undisturbed")


def test_ctrl_c_leaves_an_unfinished_folder_and_closes_its_files(
    mixtral_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    solve, calls = job.solve_piece, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return solve(*args)

    with monkeypatch.context() as patch:
        patch.setattr(job, "solve_piece", interrupted)
        with pytest.raises(KeyboardInterrupt):
            builders.compress(mixtral_folder, out, **KNOBS)
    with pytest.raises(CheckpointError, match="unfinished"):
        CompressedCheckpoint(out)
    builders.compress(mixtral_folder, out, **KNOBS)
    assert CompressedCheckpoint(out).plan.policy == KNOBS["ranks"]


def test_fp8_tensors_that_are_left_are_written_as_bfloat16(tmp_path: Path) -> None:
    shapes, config = builders.deepseek_v1()
    tensors = builders.random_tensors(shapes)
    router = "model.layers.1.mlp.gate.weight"
    tensors[router] = (tensors[router].float() * 100).to(torch.float8_e4m3fn)
    tensors[router + "_scale_inv"] = torch.tensor([[0.01]])
    source = builders.write_checkpoint(
        tmp_path / "v1", tensors, config | {"quantization_config": {"quant_method": "fp8"}}
    )
    builders.compress(source, tmp_path / "out", "hqq")
    out = CompressedCheckpoint(tmp_path / "out")
    assert out.tensors[router].dtype == "BF16"
    assert torch.equal(out.read(router), Checkpoint(source).read(router))
    assert router + "_scale_inv" not in out.tensors
