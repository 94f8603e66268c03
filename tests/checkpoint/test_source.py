"""Reading a source: what headers tell is checked at once, tensors come lazily, FP8 blocks are multiplied out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import builders
import damage
from milo.checkpoint.source import Checkpoint, read_metadata
from milo.errors import CheckpointError


@pytest.mark.parametrize("harm", damage.OF_FILES, ids=lambda harm: harm.__name__)
def test_a_broken_folder_is_refused_on_opening(harm: damage.Damage, mixtral_folder: Path, tmp_path: Path) -> None:
    folder = harm(builders.copied(mixtral_folder, tmp_path / "copy"))
    with pytest.raises(CheckpointError, match=damage.OF_FILES[harm]):
        Checkpoint(folder)


def test_headers_list_every_tensor_and_read_returns_them(mixtral_folder: Path) -> None:
    checkpoint = Checkpoint(mixtral_folder)
    shapes, config = builders.mixtral()
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == shapes
    assert checkpoint.config == config
    expected = builders.random_tensors(shapes)
    for name, info in checkpoint.tensors.items():
        assert torch.equal(checkpoint.read(name), expected[name])
        assert info.dtype == "BF16"
        assert info.nbytes == 2 * info.numel
        raw = info.file.read_bytes()[info.begin : info.end]
        assert raw == expected[name].view(torch.uint8).numpy().tobytes()


def test_opening_reads_no_weights(mixtral_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milo.checkpoint.source.safe_open", None)
    assert len(Checkpoint(mixtral_folder).tensors) == len(builders.mixtral()[0])


def test_an_absent_tensor_is_named(mixtral_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mixtral has no tensor model\.ghost"):
        Checkpoint(mixtral_folder).read("model.ghost")


def test_a_shard_that_vanishes_after_opening_is_named(mixtral_folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(builders.copied(mixtral_folder, tmp_path / "copy"))
    (tmp_path / "copy" / damage.SECOND).unlink()
    name = next(name for name, info in checkpoint.tensors.items() if info.file.name == damage.SECOND)
    with pytest.raises(CheckpointError, match=rf"cannot read {name.replace('.', '[.]')} from .*{damage.SECOND}"):
        checkpoint.read(name)


def test_metadata_of_a_shard(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"format": "pt", "k": "v"})
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt", "k": "v"}
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "b.safetensors") == {}


def fp8_folder(folder: Path, shape: tuple[int, int], scale: torch.Tensor | None, block: list[int] | None) -> Path:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    tensors = {"m.weight": weight.to(torch.float8_e4m3fn), "norm.weight": torch.ones(4)}
    if scale is not None:
        tensors["m.weight_scale_inv"] = scale
    config = {"quantization_config": {"quant_method": "fp8"} | ({"weight_block_size": block} if block else {})}
    return builders.write_checkpoint(folder, tensors, config)


@pytest.mark.parametrize("block", [None, [128, 128], [64, 32]])
@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (100, 130)])
def test_fp8_weights_are_multiplied_by_their_block_scales_ragged_edges_included(
    shape: tuple[int, int], block: list[int] | None, tmp_path: Path
) -> None:
    b0, b1 = block or [128, 128]
    blocks = (-(-shape[0] // b0), -(-shape[1] // b1))
    scale = torch.rand(blocks, generator=torch.Generator().manual_seed(1)) + 0.5
    folder = fp8_folder(tmp_path / "fp8", shape, scale, block)
    stored = load_file(folder / "model.safetensors")["m.weight"].float()
    expected = torch.empty(shape)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            rows, columns = slice(i * b0, (i + 1) * b0), slice(j * b1, (j + 1) * b1)
            expected[rows, columns] = stored[rows, columns] * scale[i, j]
    checkpoint = Checkpoint(folder)
    got = checkpoint.read("m.weight")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected.to(torch.bfloat16))
    assert checkpoint.is_block_scale("m.weight_scale_inv")
    assert not checkpoint.is_block_scale("m.weight")
    assert torch.equal(checkpoint.read("norm.weight"), torch.ones(4))


def test_fp8_without_scales_or_with_scales_of_another_shape_is_refused(tmp_path: Path) -> None:
    bare = Checkpoint(fp8_folder(tmp_path / "bare", (256, 256), None, None))
    with pytest.raises(CheckpointError, match=r"m\.weight is FP8 but m\.weight_scale_inv is missing"):
        bare.read("m.weight")
    wrong = Checkpoint(fp8_folder(tmp_path / "wrong", (256, 256), torch.ones(2, 3), None))
    with pytest.raises(
        CheckpointError, match=r"m\.weight_scale_inv has shape \(2, 3\), but m\.weight .* needs \(2, 2\)"
    ):
        wrong.read("m.weight")


def test_a_scale_like_name_beside_no_fp8_weight_is_an_ordinary_tensor(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.ones(4, 4), "m.weight_scale_inv": torch.ones(1, 1), "n_scale_inv": torch.ones(1)}
    checkpoint = Checkpoint(builders.write_checkpoint(tmp_path / "x", tensors, {}))
    assert not checkpoint.is_block_scale("m.weight_scale_inv")
    assert not checkpoint.is_block_scale("n_scale_inv")
