"""Every Mixture-of-Experts architecture of the installed transformers compresses, loads and computes, or is refused.

`zoo.moe_model_types()` finds the architectures by itself, so a type that a new transformers brings runs here unseen:
it passes, or it fails until somebody makes it work or enters it in `REFUSED` with the reason. The reference for all
logits is the same model with its matrices replaced by their reconstructions, loaded without MiLo.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.models.aria import modeling_aria

import builders
import milo
import zoo
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.source import Checkpoint
from milo.errors import UnsupportedModelError
from milo.integrations.transformers.source import open_source

CONTRACT = "the class does not follow transformers' experts contract"
INTERLEAVED = r"weight conversion Interleave\(1\)"
REFUSED = {
    "dbrx": f"DbrxExpertGLU .* {CONTRACT}",
    "diffusion_gemma": "DiffusionGemmaTextExperts .* its weights are tied to another module's",
    "ernie4_5_vl_moe": r"Ernie4_5_VLMoeMoeExperts .* weight conversion ErnieFuseAndSplitTextVisionExperts\(\)",
    "inkling2": f"Inkling2Experts .* {INTERLEAVED}",
    "inkling2_text": f"Inkling2Experts .* {INTERLEAVED}",
    "inkling_mm_model": f"InklingExperts .* {INTERLEAVED}",
    "inkling_text": f"InklingSharedExperts .* {CONTRACT}",
    "jetmoe": f"JetMoeParallelExperts .* {CONTRACT}",
    "llama4": f"Llama4TextExperts .* {CONTRACT}",
    "llama4_text": f"Llama4TextExperts .* {CONTRACT}",
    "longcat_flash": f"LongcatFlashExperts .* {CONTRACT}",
    "step3p7": f"Step3p7Experts .* {CONTRACT}",
}
if not hasattr(modeling_aria, "use_experts_implementation"):  # transformers before 5.20
    REFUSED |= dict.fromkeys(["aria", "aria_text"], f"AriaGroupedExpertsGemm .* {CONTRACT}")
# One of each kind of layout; these also go through saving, compressing on load and compressing in memory.
REPRESENTATIVE = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h",
    "switch_transformers",
]  # fmt: skip
KNOBS: dict[str, Any] = {"ranks": "dense:4+kurtosis:3", "rounds": 2}
SUPPORTED = [t for t in zoo.moe_model_types() if t not in REFUSED]


@dataclass
class Case:
    """A model on disk, its compressed form, and the compressed form as loaded."""

    source: Path
    out: Path
    auto: Any
    original: PreTrainedModel
    loaded: PreTrainedModel
    info: dict[str, Any]

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return zoo.text_part(model)(**zoo.tiny_inputs(self.original)).logits


def make_case(model_type: str, folder: Path) -> Case:
    original = zoo.tiny_model(model_type)
    original.save_pretrained(folder / "source")
    builders.compress(folder / "source", folder / "out", **KNOBS)
    auto = zoo.auto_class(model_type)
    loaded, info = auto.from_pretrained(folder / "out", dtype=torch.float32, output_loading_info=True)
    return Case(folder / "source", folder / "out", auto, original, loaded, info)


def reconstructed(case: Case, folder: Path) -> Path:
    """A copy of the source with every compressed matrix replaced by what is left of it."""
    out, source = CompressedCheckpoint(case.out), Checkpoint(case.source)
    inventory = open_source(str(case.source)).inventory
    tensors = {name: source.read(name) for name in source.tensors}
    for row in out.plan.rows:
        group = inventory.group(row.name)
        weights = [out.weight(row, member) for member in range(len(row.ranks))]
        if group.kind == "stack":
            stack = torch.stack(weights)
            weights = [stack.mT if group.transposed else stack]
        tensors |= dict(zip(group.members, weights, strict=True))
    shutil.copytree(case.source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def check_loaded(case: Case, folder: Path) -> torch.Tensor:
    """Nothing missing, nothing left over, and the logits of the reconstruction; returns them."""
    assert not case.info["missing_keys"]
    assert not case.info["unexpected_keys"]
    assert not case.info["mismatched_keys"]
    logits = case.logits(case.loaded)
    reference = case.auto.from_pretrained(reconstructed(case, folder), dtype=torch.float32)
    assert distance(logits, case.logits(reference)) < 1e-4
    assert distance(logits, case.logits(case.original)) > 1e-3  # something was compressed at all
    return logits


def raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder, to the bit."""
    tensors = Checkpoint(folder).tensors.values()
    return {t.name: (t.dtype, t.shape, t.file.read_bytes()[t.begin : t.end]) for t in tensors}


def test_the_tables_name_types_that_exist_and_contradict_nothing() -> None:
    """Older transformers lack some; a name that no version has would hide a misspelling."""
    known = set(zoo.moe_model_types())
    assert set(REPRESENTATIVE) <= known
    assert not set(REPRESENTATIVE) & REFUSED.keys()
    assert {"dbrx", "jetmoe", "llama4", "longcat_flash"} <= REFUSED.keys() & known
    assert len(SUPPORTED) >= 55


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_every_way_to_a_compressed_model_gives_the_same_one(model_type: str, tmp_path: Path) -> None:
    case = make_case(model_type, tmp_path)
    logits = check_loaded(case, tmp_path / "reference")
    stored = raw(case.out)

    case.loaded.save_pretrained(tmp_path / "again")
    assert raw(tmp_path / "again") == stored
    again = case.auto.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(case.logits(again), logits)

    config = milo.MiloConfig(**KNOBS)
    on_load = case.auto.from_pretrained(case.source, dtype=torch.float32, quantization_config=config)
    assert distance(case.logits(on_load), logits) < 1e-5
    on_load.save_pretrained(tmp_path / "on_load")
    assert raw(tmp_path / "on_load") == stored

    in_memory = milo.compress_model(case.original, milo.MiloConfig(**KNOBS))
    assert distance(case.logits(in_memory), logits) < 1e-5
    milo.save_compressed(in_memory, tmp_path / "in_memory")
    assert raw(tmp_path / "in_memory").keys() == stored.keys()
    from_memory = case.auto.from_pretrained(tmp_path / "in_memory", dtype=torch.float32)
    assert distance(case.logits(from_memory), logits) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in SUPPORTED if t not in REPRESENTATIVE])
def test_every_other_type_loads_and_computes(model_type: str, tmp_path: Path) -> None:
    check_loaded(make_case(model_type, tmp_path), tmp_path / "reference")


@pytest.mark.parametrize("model_type", [t for t in REFUSED if t in zoo.moe_model_types()])
def test_a_type_that_is_not_understood_is_refused_with_its_reason(model_type: str, tmp_path: Path) -> None:
    model = zoo.tiny_model(model_type)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        builders.compress(tmp_path / "source", tmp_path / "out", **KNOBS)
    assert not (tmp_path / "out").exists()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        milo.compress_model(model, milo.MiloConfig(**KNOBS))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_compressing_on_load_refuses_as_well(tmp_path: Path) -> None:
    zoo.tiny_model("llama4_text").save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=REFUSED["llama4_text"]):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "source", quantization_config=milo.MiloConfig(**KNOBS)
        )
