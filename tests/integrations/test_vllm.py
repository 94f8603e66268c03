"""vLLM's own models over compressed folders, on a CPU: every layout of GPUs gives the logits that transformers gives.

What runs is vLLM (`vllm_host` says what of it has a stand-in): its model classes, mappings of names, loaders, merged
layers and process groups. Skipped where vLLM is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import builders
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.errors import CheckpointError, FormatError, ServingError
from milo.format.shards import Span

vllm = pytest.importorskip("vllm", exc_type=ImportError)
if torch.cuda.is_available():
    pytest.skip("stands in for vLLM's platform: tests/gpu/test_vllm.py is the one for GPUs", allow_module_level=True)

from vllm.model_executor.models.utils import WeightsMapper  # noqa: E402

import vllm_host  # noqa: E402
from milo.integrations.vllm import register, start, versions  # noqa: E402
from milo.integrations.vllm.config import MiloQuantizationConfig  # noqa: E402
from milo.integrations.vllm.names import NamingMapper  # noqa: E402
from milo.integrations.vllm.pieces import Piece, share  # noqa: E402
from milo.integrations.vllm.refusing import RefusingConfig  # noqa: E402

pytestmark = pytest.mark.vllm

TOKENS = torch.randint(1, 128, (9,), generator=torch.Generator().manual_seed(1))
COMMON = {
    "vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 192, "moe_intermediate_size": 192, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 384, "tie_word_embeddings": True},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 192, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4, "norm_topk_prob": False},
    "deepseek_v2": {  # vLLM's ignores that the head is tied
        **LATENT, "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False, "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        **LATENT, "q_lora_rank": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
}  # fmt: skip
LAYOUTS = [
    ("mixtral", {}),
    ("mixtral", {"dtype": "bfloat16"}),
    ("mixtral", {"compiled": True}),
    ("mixtral", {"tensor": 2}),  # 192 of 384: whole groups; keys and values a head a rank
    ("mixtral", {"tensor": 4}),  # 96 of 384: one and a half groups; heads of keys and values held twice
    ("mixtral", {"pipeline": 2}),
    ("mixtral", {"tensor": 2, "experts": True}),
    ("qwen2_moe", {"tensor": 2}),
    ("qwen3_moe", {"tensor": 2}),
    ("olmoe", {"tensor": 2}),
    ("deepseek_v2", {}),
    ("deepseek_v2", {"tensor": 2, "experts": True}),
    ("deepseek_v3", {"tensor": 2}),
    ("stacks", {"tensor": 2}),
]
Made = Callable[[str], tuple[Path, torch.Tensor]]

register()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A compressed folder of a tiny model, and the logits that transformers computes with it in float32."""
    found: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, torch.Tensor]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            model_type = "qwen3_moe" if name == "stacks" else name
            torch.manual_seed(0)
            config = transformers.CONFIG_MAPPING[model_type](**{**COMMON, **MODELS[model_type]})
            AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "source")
            if name == "stacks":
                _stack(folder / "source" / "model.safetensors")
            builders.compress(folder / "source", folder / "out", ranks="dense:8+kurtosis:3", rounds=2)
            model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
            with torch.no_grad():
                found[name] = folder / "out", model(TOKENS[None]).logits[0]
        return found[name]

    return make


def _stack(file: Path) -> None:
    """Rewrite experts that stand alone as one tensor for all of them."""
    tensors = load_file(file)
    path = "model.layers.1.mlp.experts"
    gate, up, down = (
        torch.stack([tensors.pop(f"{path}.{e}.{name}_proj.weight") for e in range(4)])
        for name in ("gate", "up", "down")
    )
    fused = {f"{path}.gate_up_proj": torch.cat([gate, up], 1), f"{path}.down_proj": down}
    save_file(tensors | fused, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda value: str(value))
def test_logits_are_those_of_transformers(name: str, layout: dict[str, Any], made: Made) -> None:
    folder, expected = made(name)
    found = vllm_host.logits(folder, TOKENS, **layout)
    bound = 1.2e-2 if layout.get("dtype") == "bfloat16" else 1.5e-3
    assert (found - expected).norm() <= bound * expected.norm()


def test_a_layer_without_a_name_is_found_by_its_tensors(tmp_path: Path) -> None:
    """vLLM builds the attention of the first DeepSeek-MoE without telling a method where it stands."""
    shapes, config = builders.deepseek_v1(layers=2, hidden=128, inter=192, dense=192)
    more = {
        "model_type": "deepseek_v2", "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2,
        "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 32, "kv_lora_rank": 64, "q_lora_rank": None,
        "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    builders.write_checkpoint(tmp_path / "source", builders.random_tensors(shapes), config)
    builders.compress(tmp_path / "source", tmp_path / "out", ranks="dense:8+kurtosis:3", rounds=2)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    del stored["auto_map"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(stored | more))
    weights = dict(builders.matrices(CompressedCheckpoint(tmp_path / "out")))
    found = vllm_host.in_processes(_attention_weights, 2, tmp_path / "out")
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        q, k, v = (weights[f"{path}.{name}_proj"].chunk(2) for name in "qkv")
        outs = weights[f"{path}.o_proj"].chunk(2, 1)
        for rank in range(2):
            own = [torch.cat([q[rank], k[rank], v[rank]]), outs[rank]]
            for name, expected in zip(("qkv", "o"), own, strict=True):
                torch.testing.assert_close(found[rank][f"{layer}.{name}"], expected, atol=2e-3, rtol=2e-3)


def _attention_weights(rank: int, port: int, folder: Path) -> dict[str, torch.Tensor]:
    model = vllm_host.load(vllm_host.config(folder, tensor=2), rank, port)
    found = {}
    for number, layer in enumerate(model.model.layers):
        for name in ("qkv", "o"):
            linear = getattr(layer.self_attn, f"{name}_proj")
            eye = torch.eye(linear.input_size_per_partition, dtype=torch.float16)
            found[f"{number}.{name}"] = linear.quant_method.apply(linear, eye).T.float()
    return found


def test_weights_are_made_up_where_there_are_none(made: Made, tmp_path: Path) -> None:
    """`--load-format dummy`, with which benchmarks run sizes that nobody has compressed."""
    (tmp_path / "config.json").write_text((made("mixtral")[0] / "config.json").read_text())
    logits = vllm_host.logits(tmp_path, TOKENS, load_format="dummy", tensor=2, experts=True)
    assert logits.isfinite().all()
    assert logits.std() > 0


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_version_that_was_not_tested_is_refused_when_a_folder_is_opened() -> None:
    assert versions.supported(vllm.__version__)
    with pytest.raises(ServingError, match=r"0\.26 to 0\.33.*pip install"):
        RefusingConfig.from_config({"quant_method": "milo"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"plan_sha256": "0"}, "edited or damaged"),
        ({"format_version": 99}, "upgrade with"),
        ({"quant_method": "other"}, "not compressed with MiLo"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(damage: dict[str, Any], message: str, made: Made) -> None:
    stored = json.loads((made("mixtral")[0] / "config.json").read_text())["quantization_config"]
    with pytest.raises(FormatError, match=message):
        MiloQuantizationConfig.from_config(stored | damage)


def test_a_damaged_folder_is_refused_before_anything_is_loaded(made: Made, tmp_path: Path) -> None:
    folder = builders.copied(made("mixtral")[0], tmp_path / "copy")
    config = MiloQuantizationConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        config.maybe_update_config(str(folder))
    weights.write_bytes(whole.replace(b"w2.weight_zero", b"w2.weight_nero", 1))
    with pytest.raises(FormatError, match=r"lacks .*weight_zero"):
        config.maybe_update_config(str(folder))


def test_cuts_inside_a_block_name_what_would_fit() -> None:
    with pytest.raises(ServingError, match=r"leaves 112 of its 448.*--tensor-parallel-size 1 or 2"):
        share("w1", "out-features", 448, 112, 0, 4)
    assert share("k_proj", "out-features", 64, 32, 3, 4) == Span(32, 64, 64)  # two heads, four ranks


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 8}, "experts have codes of 3 or 4 bits"),
        ({"bits": 2}, r"codes of 2 bits .* not supported"),
        ({"factor": "int8"}, r"int8 compensators .* not supported"),
    ],
)
def test_what_no_kernel_computes_is_refused_while_the_model_is_built(
    knobs: dict[str, Any], message: str, made: Made, tmp_path: Path
) -> None:
    builders.compress(made("mixtral")[0].parent / "source", tmp_path / "out", ranks="dense:8", rounds=1, **knobs)
    with pytest.raises(RuntimeError, match=rf"ServingError: .*{message}"):
        vllm_host.in_processes(_build, 1, tmp_path / "out", 1)


def test_experts_that_cannot_be_cut_are_refused_while_the_model_is_built(made: Made) -> None:
    with pytest.raises(RuntimeError, match=r"ServingError: .*leaves 48 of its 192.*--tensor-parallel-size 1 or 2"):
        vllm_host.in_processes(_build, 4, made("olmoe")[0], 4)


def _build(rank: int, port: int, folder: Path, tensor: int) -> None:
    vllm_host.build(vllm_host.config(folder, tensor=tensor), rank, port)


def test_a_gpu_without_kernels_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.decode, "supports", lambda *arguments: (False, "sm_75 is older than sm_80"))
    start.check_kernels(torch.device("cpu"), torch.float16)
    with pytest.raises(ServingError, match=r"sm_75 is older than sm_80; `milo doctor`"):
        start.check_kernels(torch.device("cuda", 0), torch.float16)


@pytest.mark.parametrize("order", [("embed", "head"), ("head", "embed")])
def test_a_head_is_tied_only_where_the_checkpoint_has_none(order: tuple[str, ...]) -> None:
    names = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    tensors = {key: torch.full((2, 2), float(i)) for i, key in enumerate(names)}
    mapper = WeightsMapper() | NamingMapper(heads=["lm_head"]) | WeightsMapper()
    found = list(mapper.apply((names[key], tensors[key]) for key in order))
    assert [name for name, _ in found] == [names[key] for key in order]
    alone = dict(mapper.apply([(names["embed"], tensors["embed"])]))
    assert torch.equal(alone["lm_head.weight"], tensors["embed"])
    # What a model sends on to its parts goes through the mapper again.
    assert [name for name, _ in mapper.apply([("embed_tokens.weight", tensors["embed"])])] == ["embed_tokens.weight"]


def test_a_matrix_that_vllm_has_no_module_for_is_refused(made: Made) -> None:
    stored = json.loads((made("mixtral")[0] / "config.json").read_text())["quantization_config"]
    config = MiloQuantizationConfig.from_config(stored)
    config.sources("model.layers.0.self_attn.qkv_proj")
    with pytest.raises(ServingError, match=r"no module for model\.layers\.0"):
        config.check_complete()


def test_tensors_are_checked_against_the_plan(made: Made) -> None:
    checkpoint = CompressedCheckpoint(made("mixtral")[0])
    row = checkpoint.plan.by_name["model.layers.0.self_attn.q_proj"]
    tensors = checkpoint.matrix(row, 0)
    piece = Piece(row, 0, Span.all(128), Span(32, 64, 128), torch.device("cpu"))
    piece.add("weight_packed", tensors["weight_packed"])
    assert f"{row.name}.weight_packed" not in piece.missing
    with pytest.raises(FormatError, match="comes twice"):
        piece.add("weight_packed", tensors["weight_packed"])
    with pytest.raises(FormatError, match="promises no such tensor"):
        piece.add("weight_packed_hi", tensors["weight_packed"])
    with pytest.raises(FormatError, match="damaged or mixed"):
        piece.add("weight_scale", tensors["weight_scale"][:, :1])


def test_a_tensor_that_does_not_come_is_named(made: Made, tmp_path: Path) -> None:
    """Where the folder's own check did not see it: a loader that skips tensors."""
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight_zero"
    with pytest.raises(RuntimeError, match=f"FormatError: {name}"):
        vllm_host.in_processes(_load_all_but, 1, made("mixtral")[0], name)


def _load_all_but(rank: int, port: int, folder: Path, left_out: str) -> None:
    model = vllm_host.build(vllm_host.config(folder), rank, port)
    weights = load_file(folder / "model.safetensors")
    model.load_weights((name, tensor) for name, tensor in weights.items() if name != left_out)
    experts = model.model.layers[1].block_sparse_moe.experts.routed_experts
    experts.quant_method.process_weights_after_loading(experts)
