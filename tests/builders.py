"""What the core's tests are built from: tiny checkpoints on disk, and real models as tensor heads.

A checkpoint here is a mapping of tensors and a config; `write_checkpoint` makes a folder of it, `compress`
runs the whole pipeline on that folder as `milo quantize` does. `mixtral` and its siblings give names and
shapes of real layouts at any size, without weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from milo.checkpoint.compressed import CompressedCheckpoint
from milo.integrations.transformers.source import open_source
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.planning import plan_source
from milo.plan.plan import Plan
from milo.plan.recipe import custom_recipe

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Head:
    """A tensor without weights, as `take_inventory` wants it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def heads(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> list[Head]:
    return [Head(name, dtype, shape) for name, shape in shapes.items()]


def mixtral(
    layers: int = 2, hidden: int = 64, inter: int = 96, experts: int = 4, kv: int = 32, vocab: int = 128
) -> tuple[Shapes, dict[str, Any]]:
    """Names, shapes and config of a Mixtral checkpoint."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        shapes |= {f"{p}.self_attn.{n}_proj.weight": (kv, hidden) for n in "kv"}
        shapes[f"{p}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for e in range(experts):
            expert = f"{p}.block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.w1.weight": (inter, hidden), f"{expert}.w3.weight": (inter, hidden)}
            shapes[f"{expert}.w2.weight"] = (hidden, inter)
        shapes |= {
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 32),
        "num_key_value_heads": max(1, kv // 32),
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
    }
    return shapes, config


def deepseek_v1(
    layers: int = 3,
    hidden: int = 64,
    inter: int = 40,
    experts: int = 6,
    shared: int = 2,
    dense: int = 160,
    vocab: int = 128,
) -> tuple[Shapes, dict[str, Any]]:
    """DeepSeek-MoE's first layout (MHA, dense layer 0, shared experts); transformers has no class for it."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        blocks = {f"{p}.mlp": dense}
        if i > 0:
            shapes[f"{p}.mlp.gate.weight"] = (experts, hidden)
            blocks = {f"{p}.mlp.experts.{e}": inter for e in range(experts)}
            blocks[f"{p}.mlp.shared_experts"] = shared * inter
        for block, width in blocks.items():
            shapes |= {f"{block}.{n}_proj.weight": (width, hidden) for n in ("gate", "up")}
            shapes[f"{block}.down_proj.weight"] = (hidden, width)
        shapes |= {
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": inter,
        "n_routed_experts": experts,
        "n_shared_experts": shared,
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1,
        "vocab_size": vocab,
    }
    return shapes, config


MIXTRAL_8X7B = {"layers": 32, "hidden": 4096, "inter": 14336, "experts": 8, "kv": 1024, "vocab": 32000}
DEEPSEEK_16B = {
    "layers": 28, "hidden": 2048, "inter": 1408, "experts": 64, "shared": 2, "dense": 10944, "vocab": 102400,
}  # fmt: skip


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Gaussian weights of a trained model's size."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).mul_(0.05).to(dtype) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], shards: int = 1
) -> Path:
    """A model folder: `config.json`, one or more shards, an index if there are several, a tokenizer file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tiny_mixtral(folder: Path, shards: int = 1, seed: int = 0, **sizes: int) -> Path:
    """A random Mixtral on disk in bfloat16."""
    shapes, config = mixtral(**sizes)
    return write_checkpoint(folder, random_tensors(shapes, seed=seed), config, shards)


def word_tokenizer(folder: Path) -> None:
    """Give a model folder a tokenizer of the words `w1` to `w199`."""
    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 200)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="w199").save_pretrained(folder)


def compress(
    folder: Path,
    out: Path,
    recipe: str = "milo-s1",
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    restart: bool = False,
    workers: int | None = None,
    devices: str | Sequence[str] = "cpu",
    ray: bool = False,
    **knobs: Any,
) -> Plan:
    """The whole pipeline on a folder; returns the plan it carried out."""
    source = open_source(str(folder))
    plan = plan_source(source, custom_recipe(recipe, source.checkpoint.config, **knobs))
    compress_checkpoint(
        source.checkpoint,
        source.inventory,
        plan,
        out,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        restart=restart,
        workers=workers,
        devices=devices,
        ray=ray,
    )

    return plan


def matrices(checkpoint: CompressedCheckpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every reconstructed matrix: its name (`name[i]` for a stack's member) and `Ŵ`."""
    for row in checkpoint.plan.rows:
        names: Sequence[str] = row.matrices()
        if row.kind == "stack":
            names = [f"{row.name}[{i}]" for i in range(len(row.ranks))]
        for member, name in enumerate(names):
            yield name, checkpoint.weight(row, member)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; of the report without the seconds it took, the one thing that may differ."""
    hashes = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        data = path.read_bytes()
        if path.name == "milo_report.json":
            report = json.loads(data)
            assert report.pop("seconds") >= 0
            data = json.dumps(report).encode()
        hashes[path.name] = hashlib.sha256(data).hexdigest()
    return hashes


def child_environment() -> dict[str, str]:
    """For a Python subprocess that sees what this one sees."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder, to be damaged."""
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
