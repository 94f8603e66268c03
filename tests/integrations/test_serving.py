"""What `milo serve` knows before vLLM starts: options, bytes, cards, versions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import builders
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.inventory import take_inventory
from milo.errors import DeviceError, MiloError
from milo.integrations import serving
from milo.integrations.serving import Card, Weights, check_memory, default_options, given_options
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import custom_recipe, preset

CARD = Card("Thing 16", 16 * 2**30, (9, 0))


def with_dtype(folder: Path, out: Path, dtype: str | None) -> CompressedCheckpoint:
    """A copy whose config names that dtype, or none."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (out / "config.json").write_text(json.dumps(config | ({} if dtype is None else {"dtype": dtype})))
    return CompressedCheckpoint(out)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--port", "8000", "--enforce-eager"], {"port": "8000", "enforce-eager": ""}),
        (["--max_model_len=4k", "-tp", "2"], {"max-model-len": "4k", "tensor-parallel-size": "2"}),
        (["--hf-overrides", '{"a": 1}', "--", "--x"], {"hf-overrides": '{"a": 1}', "x": ""}),
    ],
)
def test_options_are_read_as_vllm_reads_them(arguments: list[str], options: dict[str, str]) -> None:
    assert given_options(arguments) == options


def test_a_config_file_counts_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("dtype: float16\ntensor_parallel_size: 4\n")
    given = given_options(["--config", str(file), "--dtype", "bfloat16"])
    assert given == {"config": str(file), "dtype": "bfloat16", "tensor-parallel-size": "4"}
    with pytest.raises(MiloError, match=r"nowhere\.yaml"):
        given_options(["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("dtype", "served"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), (None, "bfloat16")]
)
def test_the_dtype_is_the_folders(compressed_folder: Path, tmp_path: Path, dtype: str | None, served: str) -> None:
    checkpoint = with_dtype(compressed_folder, tmp_path / "copy", dtype)
    assert default_options(checkpoint, "x", {})[:2] == ["--dtype", served]


def test_a_folder_that_names_no_dtype_is_served_in_that_of_its_tensors(tmp_path: Path) -> None:
    shapes, config = builders.mixtral(layers=1)
    source = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    folder = builders.write_checkpoint(tmp_path / "source", source, config)
    builders.compress(folder, tmp_path / "out", recipe="rtn")
    checkpoint = with_dtype(tmp_path / "out", tmp_path / "copy", None)
    assert serving.serving_dtype(checkpoint) == "float16"


def test_only_what_nobody_gave_is_added(compressed_folder: Path) -> None:
    checkpoint = CompressedCheckpoint(compressed_folder)
    options = default_options(checkpoint, "some/where/out", {})
    assert options[2:] == ["--served-model-name", "out", "some/where/out", "--max-model-len", "auto"]
    assert default_options(checkpoint, "out", {"dtype": "half", "max-model-len": "1k"}) == [
        "--served-model-name",
        "out",
    ]
    given = {"dtype": "half", "max-model-len": "1k", "served-model-name": "a"}
    assert default_options(checkpoint, "out", given) == []


def test_weights_are_the_files_bytes(compressed_folder: Path) -> None:
    checkpoint = CompressedCheckpoint(compressed_folder)
    found = serving.weights(checkpoint.plan, checkpoint.tensors.values(), checkpoint.config)
    ours = {name for name, _ in checkpoint.plan.tensors()}
    others = [info for info in checkpoint.tensors.values() if info.name not in ours]
    assert found == Weights(checkpoint.plan.nbytes, sum(2 * info.numel for info in others))
    assert others


def test_weights_of_a_source_are_those_of_its_folder_to_come(mixtral_folder: Path, compressed_folder: Path) -> None:
    checkpoint = CompressedCheckpoint(compressed_folder)
    heads = serving.CompressedCheckpoint.__mro__[1](mixtral_folder).tensors.values()
    of_source = serving.weights(checkpoint.plan, heads, checkpoint.config)
    assert of_source == serving.weights(checkpoint.plan, checkpoint.tensors.values(), checkpoint.config)


def test_layers_that_are_not_served_do_not_count() -> None:
    """DeepSeek-V3's multi-token prediction layer lies in the folder as it came."""
    shapes, config = builders.mixtral(layers=2)
    inventory = take_inventory(builders.heads(shapes), config)
    plan = make_plan(inventory, preset("rtn", config), config, Evidence(lambda group: []))
    served = serving.weights(plan, builders.heads(shapes), config)
    more = {**shapes, "model.layers.2.mtp.weight": (64, 64)}
    assert serving.weights(plan, builders.heads(more), config) == served
    assert serving.weights(plan, builders.heads(more), {**config, "num_hidden_layers": 3}).other > served.other


@pytest.mark.parametrize(
    ("config", "nbytes"),
    [
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}, 131072),
        ({"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}, 98304),
        ({"num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 31104),
        ({"text_config": {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64}}, 256),
        ({"n_layer": 3}, None),
    ],
)
def test_bytes_of_the_cache(config: dict[str, int], nbytes: int | None) -> None:
    assert serving.cache_bytes(config) == nbytes


def test_memory_that_suffices_is_said() -> None:
    said = check_memory(Weights(2**32, 2**30), {}, [replace(CARD, memory=80 * 2**30), CARD])
    assert said == (
        "5.00 GiB of weights; vLLM may use 0.92 of Thing 16's 16.00 GiB: 9.72 GiB are left for the cache and the work "
        "in progress"
    )


@pytest.mark.parametrize(
    ("given", "misses", "remedy"),
    [
        ({}, "25.28 GiB are missing", "--tensor-parallel-size 4 "),
        ({"gpu-memory-utilization": "0.5"}, "32.00 GiB are missing", "--tensor-parallel-size 8 "),
        ({"tensor-parallel-size": "2"}, "5.28 GiB are missing", "--tensor-parallel-size 4 "),
        ({"kv-cache-memory-bytes": "1g"}, "24.00 GiB are missing", "--tensor-parallel-size 4 "),
        ({"tensor-parallel-size": "two"}, "25.28 GiB are missing", "--tensor-parallel-size 4 "),
    ],
)
def test_memory_that_misses_is_said_to_the_byte(given: dict[str, str], misses: str, remedy: str) -> None:
    with pytest.raises(DeviceError, match=misses) as refused:
        check_memory(Weights(40 * 2**30, 0), given, [CARD])
    assert remedy in str(refused.value)


def test_more_gpus_share_the_weights() -> None:
    needed = Weights(40 * 2**30, 0)
    assert "10.00 GiB of weights on each of 4 GPUs" in check_memory(needed, {"tensor-parallel-size": "4"}, [CARD])
    experts = {"tensor-parallel-size": "2", "data-parallel-size": "2", "enable-expert-parallel": ""}
    assert "10.00 GiB of weights on each of 4 GPUs" in check_memory(needed, experts, [CARD])
    with pytest.raises(DeviceError):  # replicas share nothing
        check_memory(needed, {"tensor-parallel-size": "2", "data-parallel-size": "2"}, [CARD])


def test_an_old_gpu_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    found = serving.missing([replace(CARD, name="Old", capability=(7, 5))])
    assert found[0] == "vLLM is not installed: `pip install 'milo-moe[vllm]'`"
    assert found[1] == "Old has compute capability 7.5, our kernels need 8.0: hide it with CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(("bits", "served"), [(3, True), (4, True), (5, False), (6, False)])
def test_a_width_without_kernels_is_refused(bits: int, served: bool) -> None:
    shapes, config = builders.mixtral()
    inventory = take_inventory(builders.heads(shapes), config)
    plan = make_plan(inventory, custom_recipe("rtn", config, bits=bits), config, Evidence(lambda group: []))
    if served:
        serving.check_kernels(plan)
        return
    with pytest.raises(MiloError, match=rf"codes of {bits} bits .* by our kernels; compress with --bits 3 or 4"):
        serving.check_kernels(plan)
