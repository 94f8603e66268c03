"""The inventory: groups and roles of the layouts that matter, and every reason for which a model is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import builders
import zoo
from milo.checkpoint.inventory import Group, Inventory, Kind, Placement, take_inventory
from milo.checkpoint.roles import Role
from milo.checkpoint.source import Checkpoint
from milo.errors import CheckpointError, UnsupportedModelError
from milo.integrations.transformers.source import open_source


def roles(inventory: Inventory) -> Counter[Role]:
    """Matrices by role, compressed ones counted one by one."""
    counted: Counter[Role] = Counter()
    for group in inventory.groups:
        counted[group.role] += group.count
    return counted


def check_whole(inventory: Inventory, shapes: builders.Shapes) -> None:
    """Every tensor stands in exactly one place."""
    members = [name for group in inventory.groups for name in group.members]
    assert Counter([*members, *inventory.left]) == Counter(list(shapes))


def test_mixtral(mixtral_folder: Path) -> None:
    inventory = open_source(str(mixtral_folder)).inventory
    shapes, config = builders.mixtral()
    check_whole(inventory, shapes)
    assert roles(inventory) == {Role.ATTENTION: 8, Role.EXPERT: 24}
    assert Counter(inventory.left.values()) == {Role.ROUTER: 2, Role.NORM: 5, Role.EMBEDDING: 1, Role.HEAD: 1}
    assert inventory.group("model.layers.1.block_sparse_moe.experts.*.w2") == Group(
        "model.layers.1.block_sparse_moe.experts.*.w2",
        Role.EXPERT,
        Kind.EXPERTS,
        tuple(f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)),
        4,
        (64, 96),
        "BF16",
    )
    # Names alone say the same: nothing of it hangs on transformers' class.
    by_names = take_inventory(builders.heads(shapes), config)
    assert {g.name: g for g in by_names.groups} == {g.name: g for g in inventory.groups}
    assert by_names.left == inventory.left


def test_groups_stand_in_checkpoint_order_and_experts_in_order_of_their_numbers() -> None:
    shapes, config = builders.mixtral(experts=12)
    inventory = take_inventory(builders.heads(dict(sorted(shapes.items()))), config)  # "10" sorts before "2"
    group = inventory.group("model.layers.0.block_sparse_moe.experts.*.w1")
    assert [int(name.split(".")[5]) for name in group.members] == list(range(12))


def test_deepseek_moes_first_layout_needs_no_class(tmp_path: Path) -> None:
    shapes, config = builders.deepseek_v1()
    folder = builders.write_checkpoint(tmp_path / "v1", builders.random_tensors(shapes), config)
    inventory = open_source(str(folder)).inventory
    check_whole(inventory, shapes)
    assert roles(inventory) == {
        Role.ATTENTION: 12,
        Role.DENSE_FFN: 3,
        Role.SHARED_EXPERT: 6,
        Role.EXPERT: 2 * 6 * 3,
    }
    assert Counter(inventory.left.values()) == {Role.ROUTER: 2, Role.NORM: 7, Role.EMBEDDING: 1, Role.HEAD: 1}
    assert inventory.group("model.layers.1.mlp.experts.*.gate_proj").experts_path == "model.layers.1.mlp.experts"


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_layouts_with_a_class_are_the_same_with_and_without_it(model_type: str, tmp_path: Path) -> None:
    zoo.tiny_model(model_type).save_pretrained(tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    check_whole(source.inventory, {name: i.shape for name, i in source.checkpoint.tensors.items()})
    by_names = take_inventory(source.checkpoint.tensors.values(), source.checkpoint.config)
    assert by_names.groups == source.inventory.groups
    counted = roles(source.inventory)
    assert counted[Role.EXPERT] >= 12
    assert counted[Role.ATTENTION] >= 8
    if model_type != "olmoe" and model_type != "qwen3_moe":
        assert counted[Role.SHARED_EXPERT] >= 3
    assert not [g.name for g in source.inventory.groups if g.name.endswith(("mlp.gate", "shared_expert_gate"))]


def test_deepseek_v3_in_fp8_is_read_through_its_block_scales(tmp_path: Path) -> None:
    model = zoo.tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "bf16")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "bf16" / "model.safetensors").items():
        if tensor.ndim == 2 and "proj" in name:
            scale = torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) / 100 + 0.01
            blocks = scale.repeat_interleave(128, 0)[: tensor.shape[0]].repeat_interleave(128, 1)[:, : tensor.shape[1]]
            tensors[name] = (tensor / blocks).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = Checkpoint(tmp_path / "bf16").config | {"quantization_config": fp8}
    folder = builders.write_checkpoint(tmp_path / "fp8", tensors, config)
    inventory = open_source(str(folder)).inventory
    plain = open_source(str(tmp_path / "bf16")).inventory
    assert [(g.name, g.role, g.shape) for g in inventory.groups] == [(g.name, g.role, g.shape) for g in plain.groups]
    assert {g.dtype for g in inventory.groups} == {"F8_E4M3"}
    assert inventory.left == plain.left  # the scales are no tensors of their own
    builders.compress(folder, tmp_path / "out", "hqq")
    out = builders.CompressedCheckpoint(tmp_path / "out")
    for row in out.plan.rows:
        for member, name in enumerate(inventory.group(row.name).members):
            source = Checkpoint(folder).read(name).float()
            assert (out.weight(row, member) - source).norm() < 0.25 * source.norm()
    assert not [name for name in out.tensors if name.endswith("_scale_inv")]


def test_tensors_that_the_class_does_not_use_are_left_alone(tmp_path: Path) -> None:
    """DeepSeek-V3 ships a multi-token-prediction layer after the last one, which transformers does not load."""
    model = zoo.tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    extra = {
        "model.layers.2.self_attn.o_proj.weight": torch.zeros(64, 64),
        "model.layers.2.eh_proj.weight": torch.zeros(64, 128),
    }
    folder = builders.write_checkpoint(tmp_path / "mtp", tensors | extra, Checkpoint(tmp_path / "m").config)
    inventory = open_source(str(folder)).inventory
    assert extra.keys() <= inventory.left.keys()
    assert [g.name for g in inventory.groups] == [g.name for g in open_source(str(tmp_path / "m")).inventory.groups]


def test_stacks_need_a_class_that_says_how_they_are_laid_out(tmp_path: Path) -> None:
    zoo.tiny_model("gpt_oss").save_pretrained(tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    group = source.inventory.group("model.layers.0.mlp.experts.gate_up_proj")
    assert (group.kind, group.count, group.shape, group.transposed) == (Kind.STACK, 4, (192, 64), True)
    assert group.experts_path == "model.layers.0.mlp.experts"
    heads = source.checkpoint.tensors.values()
    with pytest.raises(UnsupportedModelError, match=r"down_proj \(4, 96, 64\) fuses its experts .* install a trans"):
        take_inventory(heads, source.checkpoint.config)


def test_experts_numbered_behind_a_word(tmp_path: Path) -> None:
    shapes = {f"encoder.block.1.layer.1.mlp.experts.expert_{e}.wi.weight": (96, 64) for e in range(3)}
    inventory = take_inventory(builders.heads(shapes), {"model_type": "switch"})
    assert [g.name for g in inventory.groups] == ["encoder.block.1.layer.1.mlp.experts.expert_*.wi"]
    assert inventory.groups[0].experts_path == "encoder.block.1.layer.1.mlp.experts"


def refuse(message: str, shapes: builders.Shapes, config: dict[str, Any], **kwargs: Any) -> None:
    error = kwargs.pop("error", UnsupportedModelError)
    with pytest.raises(error, match=message):
        take_inventory(builders.heads(shapes, **kwargs), config)


def test_a_dense_model_is_refused_by_name() -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.layers.0.mlp.up_proj.weight": (128, 64)}
    refuse(r"^LlamaForCausalLM: no experts found", shapes, {"architectures": ["LlamaForCausalLM"]})
    refuse(r"^llama: no experts found", shapes, {"model_type": "llama"})
    refuse(r"^this model: no experts found", shapes, {})


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "milo", "compressed-tensors"])
def test_a_quantised_source_is_refused_by_its_method(method: str) -> None:
    shapes, config = builders.mixtral()
    config["quantization_config"] = {"quant_method": method}
    refuse(rf"^MixtralForCausalLM is already quantised \(quant_method: {method}\); start from the", shapes, config)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_missing_expert_is_an_incomplete_download(missing: int) -> None:
    shapes, config = builders.mixtral()
    del shapes[f"model.layers.1.block_sparse_moe.experts.{missing}.w3.weight"]
    message = rf"layers\.1\.block_sparse_moe\.experts\.\*\.w3\.weight: expert {missing} is missing; finish the download"
    refuse(message, shapes, config, error=CheckpointError)


def test_experts_of_unequal_shapes_are_refused() -> None:
    shapes, config = builders.mixtral()
    shapes["model.layers.0.block_sparse_moe.experts.3.w1.weight"] = (128, 64)
    refuse(r"experts\.3\.w1\.weight \(128, 64\) BF16 differs from .*experts\.0\.w1\.weight \(96, 64\)", shapes, config)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "BOOL"])
def test_integer_weights_are_refused(dtype: str) -> None:
    shapes, config = builders.mixtral()
    refuse(rf"has dtype {dtype}, which is no floating-point weight", shapes, config, dtype=dtype)


def test_below_95_percent_of_the_expert_weights_is_an_error() -> None:
    """Experts narrower than 32 stay behind; a twentieth of the weights may, more may not."""
    shapes, config = builders.mixtral(layers=1, experts=2)
    whole = 2 * 3 * 96 * 64
    narrow = {"model.layers.1.block_sparse_moe.experts.0.w1.weight": (16, 115)}  # 16 · 115 = 1840: 4.8 %
    inventory = take_inventory(builders.heads(shapes | narrow), config)
    assert inventory.expert_parameters == whole + 1840
    assert inventory.small_experts == list(narrow)
    assert next(iter(narrow)) in inventory.left
    narrow = {"model.layers.1.block_sparse_moe.experts.0.w1.weight": (16, 122)}  # 5.03 %
    refuse(r"only 95\.0% of the expert .*instance model\.layers\.1\.block.*; 95% is required", shapes | narrow, config)


def test_an_experts_class_that_is_not_understood_is_refused_by_its_name() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    placement = Placement("model.layers.0.mlp.experts", "gate_up_proj", "OddExperts", "refused", reason="it is odd")
    with pytest.raises(UnsupportedModelError, match=r"OddForCausalLM: OddExperts holds experts \(.*\) .*: it is odd"):
        take_inventory(
            [builders.Head(name, "BF16", (4, 96, 64))], {"architectures": ["OddForCausalLM"]}, {name: placement}
        )


def test_a_matrix_whose_module_is_no_plain_linear_is_left_alone() -> None:
    shapes, config = builders.mixtral(layers=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    places = {n: Placement(n.rpartition(".")[0], "weight", "Linear", "linear") for n in shapes}
    places[name] = Placement("model.layers.0.self_attn.q_proj", "weight", "GroupedLinear", "other")
    inventory = take_inventory(builders.heads(shapes), config, places)
    assert inventory.left[name] is Role.OTHER


def test_a_matrix_that_is_no_weight_is_left_alone_where_no_class_explains_it() -> None:
    shapes, config = builders.mixtral(layers=1)
    adapter = {"model.layers.0.self_attn.q_proj.lora_A": (64, 64)}
    assert take_inventory(builders.heads(shapes | adapter), config).left[next(iter(adapter))] is Role.OTHER


def test_an_unknown_group_is_a_key_error() -> None:
    shapes, config = builders.mixtral()
    with pytest.raises(KeyError):
        take_inventory(builders.heads(shapes), config).group("model.ghost")
