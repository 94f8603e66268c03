"""A compressed folder inside transformers: generation, devices, dtypes, heads, and what is refused or warned about."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import builders
import milo
import zoo
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.source import Checkpoint
from milo.errors import CheckpointError, FormatError, MiloError, PlanError, UnsupportedModelError
from milo.modules.experts import CompressedExperts
from milo.modules.matrix import CompressedLinear, CompressedMatrix

IDS = torch.arange(3, 19).reshape(2, 8)
KNOBS = {"ranks": "dense:4+kurtosis:3", "rounds": 2}


@pytest.fixture(scope="module")
def loaded(compressed_folder: Path) -> PreTrainedModel:
    """Read-only."""
    return AutoModelForCausalLM.from_pretrained(compressed_folder, dtype=torch.float32)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.float().cpu()


def compressed_modules(model: PreTrainedModel) -> dict[str, CompressedMatrix]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedMatrix)}


def test_weights_stay_packed_in_memory(loaded: PreTrainedModel, compressed_folder: Path) -> None:
    out = CompressedCheckpoint(compressed_folder)
    modules = compressed_modules(loaded)
    renamed = {name.replace("block_sparse_moe", "mlp") for name, _ in builders.matrices(out)}  # as transformers does
    assert modules.keys() == renamed
    packed = sum(t.numel() * t.element_size() for m in modules.values() for t in m.parameters())
    assert packed == out.plan.nbytes
    assert {type(m) for m in modules.values()} == {CompressedMatrix, CompressedLinear}
    blocks = [m for m in loaded.modules() if isinstance(m, CompressedExperts)]
    assert len(blocks) == 2
    assert all(type(block).__name__ == "MiloMixtralExperts" for block in blocks)
    assert not any(p.ndim == 3 for p in loaded.parameters())
    assert {m.ranks for name, m in modules.items() if "experts" in name} > {(0,)}  # ranks differ
    assert "bits=3, group=64" in repr(loaded)


def test_generate_works_and_goes_on_as_the_logits_say(loaded: PreTrainedModel) -> None:
    tokens = loaded.generate(IDS, max_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, 13)
    with torch.no_grad():
        greedy = loaded(tokens[:, :-1]).logits.argmax(-1)
    assert torch.equal(tokens[:, 8:], greedy[:, 7:])


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"])
def test_device_maps(device_map: object, loaded: PreTrainedModel, compressed_folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this pins the CPU; tests/gpu has the rest")
    model = AutoModelForCausalLM.from_pretrained(compressed_folder, device_map=device_map, dtype=torch.float32)
    assert torch.equal(logits(model), logits(loaded))
    assert torch.equal(model.generate(IDS, max_new_tokens=3), loaded.generate(IDS, max_new_tokens=3))


def test_layers_on_disk_are_fetched_when_used(loaded: PreTrainedModel, compressed_folder: Path, tmp_path: Path) -> None:
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        compressed_folder, device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert model.model.layers[1].self_attn.q_proj.weight_packed.device.type == "meta"
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("change", ["float16", "bfloat16", "double", "to"])
def test_other_dtypes_leave_packed_tensors_alone(change: str, compressed_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed_folder, dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters() if re.search(r"weight_|lowrank", n)}
    reference = logits(model)
    dtype = {"float16": torch.float16, "double": torch.float64}.get(change, torch.bfloat16)
    changed = model.to(dtype) if change in ("float16", "to") else getattr(model, change)()
    assert changed.lm_head.weight.dtype == dtype
    after = dict(changed.named_parameters())
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    got = changed(IDS).logits
    assert got.dtype == dtype
    error = (got.float() - reference).norm() / reference.norm()
    assert error < (1e-5 if change == "double" else 0.05)


def test_half_is_refused_by_transformers_itself(loaded: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="not supported for quantized model"):
        loaded.half()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_loading_in_a_dtype(dtype: object, loaded: PreTrainedModel, compressed_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed_folder, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert model.lm_head.weight.dtype == expected
    scales = [p for n, p in model.named_parameters() if n.endswith("weight_scale")]
    assert {p.dtype for p in scales} == {torch.float16}
    reference = logits(loaded)
    assert (logits(model) - reference).norm() < 0.05 * reference.norm()


def test_a_model_without_its_head_loads_and_gives_the_same_states(
    loaded: PreTrainedModel, compressed_folder: Path
) -> None:
    model, info = AutoModel.from_pretrained(compressed_folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "MixtralModel"
    assert not info["missing_keys"]
    with torch.no_grad():
        states = model(IDS).last_hidden_state
        assert torch.equal(loaded.lm_head(states), loaded(IDS).logits)


def test_a_headless_model_is_compressed_and_loaded_with_a_head(mixtral_folder: Path, tmp_path: Path) -> None:
    bare = AutoModel.from_pretrained(mixtral_folder, dtype=torch.float32)
    milo.compress_model(bare, milo.MiloConfig(**KNOBS))
    milo.save_compressed(bare, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(model.model(IDS).last_hidden_state, bare(IDS).last_hidden_state)


def test_save_compressed_writes_the_report_and_the_card(mixtral_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral_folder, dtype=torch.bfloat16)
    seen: list[tuple[int, int, str]] = []
    milo.compress_model(model, milo.MiloConfig(**KNOBS), progress=lambda *step: seen.append(step))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    milo.save_compressed(model, tmp_path / "out", max_shard_size="60KB")
    out = CompressedCheckpoint(tmp_path / "out")
    builders.compress(mixtral_folder, tmp_path / "folder", **KNOBS)
    folder = CompressedCheckpoint(tmp_path / "folder")
    assert out.plan.by_name == folder.plan.by_name
    errors = {m["name"]: m["error"] for m in folder.report["matrices"]}
    of_memory = {
        (m["name"] if "member" not in m else f"{m['name']}[{m['member']}]"): m["error"] for m in out.report["matrices"]
    }
    assert of_memory == pytest.approx(errors, rel=1e-6)
    assert out.report["files_bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert "import milo" in (tmp_path / "out" / "README.md").read_text()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_compressing_on_load_is_milo_quantize_bit_for_bit(mixtral_folder: Path, tmp_path: Path) -> None:
    builders.compress(mixtral_folder, tmp_path / "out", **KNOBS)
    model = AutoModelForCausalLM.from_pretrained(
        mixtral_folder, dtype=torch.bfloat16, quantization_config=milo.MiloConfig(**KNOBS)
    )
    model.save_pretrained(tmp_path / "on_load")
    a, b = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "on_load")
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)
    mine, theirs = (c.config["quantization_config"] for c in (a, b))
    assert mine["plan_sha256"] == theirs["plan_sha256"]
    CompressedCheckpoint(tmp_path / "on_load")


def test_frequency_counts_travel_with_the_config(mixtral_folder: Path) -> None:
    counts = {f"model.layers.{i}.block_sparse_moe.experts": [5.0, 0.0, 1.0, 2.0] for i in range(2)}
    config = milo.MiloConfig(ranks="frequency:4", rounds=1, counts=counts)
    model = AutoModelForCausalLM.from_pretrained(mixtral_folder, quantization_config=config)
    matrices = [compressed_modules(model)[f"model.layers.0.mlp.experts.{e}.w1"] for e in range(4)]
    assert [m.ranks for m in matrices] == [(10,), (0,), (2,), (4,)]
    with pytest.raises(PlanError, match="milo profile"):
        AutoModelForCausalLM.from_pretrained(mixtral_folder, quantization_config=milo.MiloConfig(ranks="frequency:4"))


def test_what_is_compressed_is_not_compressed_again(loaded: PreTrainedModel, compressed_folder: Path) -> None:
    with pytest.raises(MiloError, match="MixtralForCausalLM is already quantised"):
        milo.compress_model(loaded)
    with pytest.raises(UnsupportedModelError, match=r"already quantised \(quant_method: milo\)"):
        builders.compress(compressed_folder, compressed_folder.parent / "twice")


def test_a_model_that_is_not_compressed_is_not_saved_as_one(tmp_path: Path) -> None:
    model = zoo.tiny_model("mixtral")
    with pytest.raises(MiloError, match=r"MixtralForCausalLM is not compressed; call milo.compress_model first"):
        milo.save_compressed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_refused_unchanged() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match=r"^llama: no experts found"):
        milo.compress_model(model)
    assert not compressed_modules(model)


def test_compressing_on_load_needs_a_checkpoint(mixtral_folder: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(mixtral_folder).state_dict()
    config = AutoModelForCausalLM.from_pretrained(mixtral_folder).config
    from transformers import MixtralForCausalLM

    with pytest.raises(CheckpointError, match=r"needs a checkpoint on disk; use milo.compress_model instead"):
        MixtralForCausalLM.from_pretrained(
            None, config=config, state_dict=state, quantization_config=milo.MiloConfig(**KNOBS)
        )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 7}, "bits = 7 is not supported"),
        ({"group_size": 48}, "group_size = 48 is not supported"),
        ({"recipe": "magic"}, "unknown recipe 'magic'"),
        ({"grid": "awq"}, "unknown grid 'awq'"),
        ({"rounds": 0}, "rounds = 0"),
        ({"factor": "int4"}, "factor = 'int4' is not supported"),
    ],
)
def test_a_bad_knob_is_refused_when_the_config_is_made(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        milo.MiloConfig(**knobs)  # type: ignore[arg-type]


def test_a_config_survives_json_before_and_after_compression(loaded: PreTrainedModel, compressed_folder: Path) -> None:
    knobs = milo.MiloConfig(bits=4, ranks="dense:3").to_dict()
    assert knobs == {"quant_method": "milo", "recipe": "milo-s1", "ranks": "dense:3", "bits": 4}
    stored = json.loads((compressed_folder / "config.json").read_text())["quantization_config"]
    assert loaded.config.quantization_config.to_dict() == stored
    assert milo.MiloConfig.from_dict(stored).to_dict() == stored
    assert json.loads(loaded.config.to_json_string())["quantization_config"] == stored


def test_a_tampered_or_newer_folder_does_not_load(compressed_folder: Path, tmp_path: Path) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "copy")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    builders.edit_json(folder / "config.json", quantization_config={**stored, "format_version": 2})
    with pytest.raises(FormatError, match="has format version 2, newer than this MiLo reads"):
        AutoModelForCausalLM.from_pretrained(folder)
    builders.edit_json(folder / "config.json", quantization_config={**stored, "plan": {**stored["plan"], "rounds": 9}})
    with pytest.raises(FormatError, match="does not match its plan_sha256"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_plan_for_another_model_does_not_load(compressed_folder: Path, tmp_path: Path) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "copy")
    builders.edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(
        FormatError, match=r"the plan compresses model\.layers\.1\..*, but MixtralForCausalLM has no such"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    builders.edit_json(folder / "config.json", num_hidden_layers=2, num_key_value_heads=2)
    with pytest.raises(FormatError, match=r"self_attn\.k_proj is \(32, 64\) in the plan but \(64, 64\) in Mixtral"):
        AutoModelForCausalLM.from_pretrained(folder)


def child(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=builders.child_environment(), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_without_import_milo_transformers_warns_and_the_files_say_what_to_do(compressed_folder: Path) -> None:
    """The claim of the card and of the config's note: no error, a warning, and random experts."""
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "milo" not in sys.modules
assert not any("weight_packed" in name for name, _ in model.named_parameters())
print(type(model).__name__)
"""
    done = child(code, str(compressed_folder))
    said = done.stdout + done.stderr
    assert "milo" in said
    assert re.search(r"Unknown quantization type.*milo|quant_method.*milo|milo.*not supported", said, re.I | re.S), said
    if done.returncode == 0:  # the note's "fills the experts with random numbers" is then what happened
        assert "MixtralForCausalLM" in done.stdout
        assert re.search(r"newly initialized|MISSING", said), said
    note = Checkpoint(compressed_folder).config["quantization_config"]["note"]
    assert "import milo" in note
    assert "import milo" in (compressed_folder / "README.md").read_text()


@pytest.mark.slow
def test_importing_milo_touches_neither_cuda_nor_vllm() -> None:
    code = """
import sys
import milo, torch
assert not torch.cuda.is_initialized()
assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "datasets", "matplotlib", "lm_eval")]
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZATION_CONFIG_MAPPING["milo"] is milo.MiloConfig
assert AUTO_QUANTIZER_MAPPING["milo"].__name__ == "MiloQuantizer"
"""
    done = child(code)
    assert done.returncode == 0, done.stderr
