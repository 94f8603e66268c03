"""Tiny random models of every Mixture-of-Experts architecture that the installed transformers has.

    moe_model_types()          discovered from transformers' sources, never a list of names
    tiny_config(model_type)    the default config, shrunk (tables in `zoo_overrides.py`)
    tiny_model(model_type)     float32, eval, CPU; all weights random and deterministic in `seed`
    tiny_inputs(model)         text-only inputs for which `text_part(model)(**inputs)` returns logits
    auto_class(model_type)     the Auto class that loads it
    expert_modules(model)      the modules that hold its routed experts, by name

Discovery. A package `transformers/models/<x>` counts when its modelling source decorates a class with
`use_experts_implementation`, defines a `*Experts` module or assigns `self.experts`. Of its config types those
are listed that an Auto class maps to a text head (causal, image-text-to-text, seq2seq, token classification);
so a multimodal model is listed as its parent type, and its `x_text` type only if that has a head of its own.
Packages that merely nest such a text model by default (`kimi_k25` around `deepseek_v3`) are listed too. Not
listed: vision backbones (`vitpose_backbone`), `doge` (its "experts" are rows of an embedding), and wrappers
that hold a MoE only when configured to (`mistral3` around `mistral4`).

A new architecture therefore appears by itself; if the general tables cannot shrink it, `tiny_model` raises
`ZooError` naming the type, and an entry in `zoo_overrides.OVERRIDES` is due.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo_overrides import ALWAYS, DENSE, EXPERT, EXPERTS, NOT_BUILT, OVERRIDES, TEXT, TOWER, VOCAB

MAX_PARAMETERS = 4_000_000  # above this something was not shrunk
HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "MULTIMODAL_LM": "AutoModelForMultimodalLM",
    "TOKEN_CLASSIFICATION": "AutoModelForTokenClassification",
}
TOWER_KEY = re.compile(r"vision|audio|sam|encoder|code2wav|diarization|timestamp")
SPECIAL_ID = re.compile(r"_token_(id|index)$|_id$|^(image|video|audio)_token")
TEXT_CONFIGS = ("text_config", "thinker_config")
EXPERTS_SOURCE = re.compile(
    r"^@use_experts_implementation|^class (?!\w*Shared)\w*Experts\(nn\.Module|^\s+self\.experts\s*=", re.M
)


class ZooError(RuntimeError):
    """The general tables cannot shrink this architecture: it needs an entry in `zoo_overrides.OVERRIDES`."""


# -------------------------------------------------------------------------------------------------- discovery


@functools.cache
def moe_model_types() -> list[str]:
    """Every model_type of the installed transformers that has a text head and experts modules, sorted."""
    packages = {package for package, source in _sources("modeling_*.py") if EXPERTS_SOURCE.search(source)}
    of_package: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING:
        if _head(model_type)[0]:
            of_package.setdefault(_package(CONFIG_MAPPING[model_type]), []).append(model_type)
    found = {model_type for package in packages for model_type in of_package.get(package, [])}
    nested = re.compile(r"(?:model_type=|CONFIG_MAPPING\[)\"([\w-]+)\"")
    for package, source in _sources("configuration_*.py"):
        if package != "auto" and found & set(nested.findall(source)):
            found |= {t for t in of_package.get(package, []) if _has_text_config(CONFIG_MAPPING[t])}
    return sorted(found - NOT_BUILT.keys())


def _sources(pattern: str) -> list[tuple[str, str]]:
    root = Path(transformers.__file__).parent / "models"
    return [(path.parent.name, path.read_text()) for path in sorted(root.glob(f"*/{pattern}"))]


def _package(config_class: type) -> str:
    return config_class.__module__.split(".")[2]


def _has_text_config(config_class: type) -> bool:
    return any(key in config_class.sub_configs for key in TEXT_CONFIGS)


def _head(model_type: str) -> tuple[str, str]:
    """Names of the Auto class and of the model class that give this type its text head, or empty strings."""
    multimodal = [*HEADS][2:4] if _has_text_config(CONFIG_MAPPING[model_type]) else []
    for head in [*multimodal, *HEADS]:
        if name := getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {}).get(model_type):
            return HEADS[head], name if isinstance(name, str) else name[0]
    return "", ""


def auto_class(model_type: str) -> type:
    """The Auto class whose `from_pretrained` gives the class of `tiny_model(model_type)`."""
    return getattr(transformers, _head(model_type)[0])


# ---------------------------------------------------------------------------------------------------- configs


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of `model_type`, shrunk."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_shrink(cls, cls(), tower=False))


def _shrink(cls: type, default: PreTrainedConfig, tower: bool) -> dict[str, Any]:
    """Tiny values for what `cls` declares, to build it anew so that all its derivations run again."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in inherited}
    plain, table = cls(), TOWER if tower else TEXT
    tiny: dict[str, Any] = {}
    special = iter(range(VOCAB - 1, 0, -1))  # ids of image/audio/... tokens: the top of the vocabulary
    for name, value in fields.items():
        carried = vars(default).get(name)  # what the parent config sets for its sub-config
        if isinstance(carried, (int, float, str)) and carried != vars(plain).get(name):
            tiny[name] = value = carried
        if name in table and (name in ALWAYS or (value and value is not dataclasses.MISSING)):
            tiny[name] = table[name]
        elif SPECIAL_ID.search(name) and isinstance(value, int) and value >= VOCAB:
            tiny[name] = next(special)
    if not tower:
        _shrink_mlp(fields, tiny)
        _shrink_layers(fields, default, tiny)
    for key in cls.sub_configs:
        if (sub := getattr(default, key, None)) is not None:
            kind = {"model_type": sub.model_type} if sub.model_type else {}
            tiny[key] = kind | _shrink(type(sub), sub, tower or bool(TOWER_KEY.search(key)))
    return tiny | OVERRIDES.get(cls.model_type or cls.__name__, {})


def _shrink_mlp(fields: dict[str, Any], tiny: dict[str, Any]) -> None:
    """`intermediate_size` is the experts' width, or the dense one where experts have a name of their own."""
    own = {"moe_intermediate_size", "expert_ffn_hidden_size"}
    for name in ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"):
        if name in fields:
            tiny[name] = DENSE if fields.keys() & own else EXPERT


def _shrink_layers(fields: dict[str, Any], default: PreTrainedConfig, tiny: dict[str, Any]) -> None:
    """One layer of each kind of attention, at least two; the first one dense where the default has any."""
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    count = max(2, len(kinds)) if "layer_types" in fields else 2
    if kinds and "layer_types" in fields:
        tiny["layer_types"] = kinds if len(kinds) > 1 else kinds * count
    if "num_hidden_layers" in fields:
        tiny["num_hidden_layers"] = count
    if "mlp_layer_types" in fields and "dense" in (getattr(default, "mlp_layer_types", None) or []):
        tiny["mlp_layer_types"] = ["dense"] + ["sparse"] * (count - 1)
    if "mlp_only_layers" in fields and getattr(default, "mlp_only_layers", None):
        tiny["mlp_only_layers"] = [0]


# ----------------------------------------------------------------------------------------------------- models


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model: float32, eval mode, on the CPU; the same seed gives the same weights."""
    name = _head(model_type)[1]
    try:
        cls = getattr(transformers, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls._from_config(tiny_config(model_type), dtype=torch.float32).eval()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ZooError(f"{model_type}: cannot build a tiny {name}: {reason}") from error
    if not expert_modules(model):
        raise ZooError(f"{model_type}: the tiny {name} has no experts module")
    if (size := model.num_parameters()) > MAX_PARAMETERS:
        raise ZooError(f"{model_type}: the tiny {name} still has {size:,} parameters")
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Random weights of moderate size everywhere: matrices, biases, norm weights off their default."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():  # hash routing: a fixed table from token id to expert ids
        if (table := getattr(module, "tid2eid", None)) is not None:
            ranks = torch.rand(len(table), EXPERTS, generator=generator)
            table.copy_(ranks.argsort(dim=1)[:, : table.shape[1]])
    # `endswith`: zaya's `balancing_biases[-1]` is a constant that loading sets again, whatever the file says
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("bias")]
    for name, tensor in [*model.named_parameters(), *buffers]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        noise = torch.empty_like(tensor).normal_(generator=generator)
        if id(tensor) in embeddings:
            tensor.copy_(0.2 * noise)
        elif "bias" in name.rpartition(".")[2]:
            tensor.copy_(0.02 * noise)
        elif tensor.ndim == 1:  # norm weights, scales, decay rates: around their own initial value
            tensor.add_(0.05 * noise)
        else:
            tensor.copy_(0.05 * noise)


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold routed experts, outermost only, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        named = re.search(r"(?<!Shared)Experts$", type(module).__name__)
        if (named or name.endswith(".experts")) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The module whose forward maps token ids to logits: the model, or the thinker of an any-to-any model."""
    return model.thinker if hasattr(model, "thinker") else model


def tiny_inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Text-only inputs for `text_part(model)(**inputs).logits`; ids stay clear of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(8, VOCAB // 2, (2, 16), generator=generator)}
    if "decoder_input_ids" in inspect.signature(text_part(model).forward).parameters:
        inputs["decoder_input_ids"] = torch.randint(8, VOCAB // 2, (2, 16), generator=generator)
    return inputs
