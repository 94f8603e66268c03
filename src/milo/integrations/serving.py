"""Before `vllm serve` starts: is everything there, will the folder fit, and which options does it need.

vLLM reads a model for minutes before it finds that something is missing, and then says so from inside a worker. What
can be known from headers, package metadata and the cards' sizes is checked here first. Only three of vLLM's own
defaults are wrong for a compressed folder, so only three options are added (`default_options`); whatever the user
says stays as it is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml

from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.inventory import TensorHead
from milo.checkpoint.roles import LAYER_INDEX, Role
from milo.errors import DeviceError, MiloError
from milo.format.matrix import DTYPE_BYTES
from milo.integrations.vllm.versions import RANGE, supported
from milo.kernels import decode, layout
from milo.plan.plan import Plan

PLUGIN = "milo"  # our name in vLLM's entry points
PLUGIN_GROUP = "vllm.general_plugins"
MIN_CAPABILITY = (8, 0)
UTILISATION = 0.92  # vLLM's default of --gpu-memory-utilization
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}
_SHORT = {"-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size"}


def given_options(arguments: Sequence[str]) -> dict[str, str]:
    """What the user says to vLLM: option names with dashes, values as text (`""` where there is none).

    Options of a YAML file (`--config FILE`) count, those of the command line win, as in vLLM.

    Raises:
        MiloError: the file cannot be read.
    """
    options: dict[str, str] = {}
    for argument, following in pairwise([*arguments, ""]):
        if not argument.startswith("-") or argument == "--":
            continue
        name, equals, value = argument.partition("=")
        name = _SHORT.get(name) or name.removeprefix("--").replace("_", "-")
        options[name] = value if equals else ("" if following.startswith("-") else following)
    if "config" not in options:
        return options
    try:
        inside = yaml.safe_load(Path(options["config"]).read_text(encoding="utf-8")) or {}
        return {**{str(key).replace("_", "-"): str(value) for key, value in inside.items()}, **options}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise MiloError(f"--config {options['config']} is no YAML file of options: {error}") from error


def default_options(checkpoint: CompressedCheckpoint, typed: str, given: Mapping[str, str]) -> list[str]:
    """The options of `vllm serve` that a compressed folder needs and nobody gave.

    * `--dtype`: the folder's. vLLM's `auto` does the same where `config.json` names one; where it does not, vLLM takes
      a common type of all tensors, among which ours are integers and fp16 scales. float32 folders are served in
      bfloat16.
    * `--served-model-name`: the folder's name, and the path as it was typed; vLLM's default is the path alone.
    * `--max-model-len auto`: the model's context, or as much of it as the cache has room for; vLLM's default is to
      stop where the whole context has no room.

    Args:
        checkpoint: the folder.
        typed: the folder as the user typed it.
        given: from `given_options`.
    """
    options = []
    if "dtype" not in given:
        options += ["--dtype", serving_dtype(checkpoint)]
    if "served-model-name" not in given:
        options += ["--served-model-name", *dict.fromkeys([checkpoint.folder.resolve().name, typed])]
    if "max-model-len" not in given:
        options += ["--max-model-len", "auto"]
    return options


def serving_dtype(checkpoint: CompressedCheckpoint) -> str:
    """`float16` or `bfloat16`: what the folder's config says, else what its uncompressed tensors are."""
    config = checkpoint.config
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                return part[key] if part[key] in _DTYPES.values() else "bfloat16"
    ours = {name for name, _ in checkpoint.plan.tensors()}
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.name not in ours:
            sizes[info.dtype] += info.numel
    return _DTYPES.get(max(sizes, key=lambda dtype: sizes[dtype]), "bfloat16") if sizes else "bfloat16"


@dataclass(frozen=True)
class Weights:
    """Bytes of a compressed model's weights in memory.

    Attributes:
        compressed: the matrices of the plan, as they lie on disk; the kernels' layout pads ranks to 16 on top.
        other: everything else that is loaded, at two bytes a number.
    """

    compressed: int
    other: int

    @property
    def total(self) -> int:
        return self.compressed + self.other


def weights(plan: Plan, heads: Iterable[TensorHead], config: Mapping[str, Any]) -> Weights:
    """What a plan leaves of a model.

    Args:
        plan: the plan.
        heads: every tensor, of the compressed folder or of the source.
        config: `config.json`; layers above its `num_hidden_layers` (multi-token prediction) are not loaded.
    """
    ours = {matrix for row in plan.rows for matrix in row.matrices()}
    layers = _text_config(config).get("num_hidden_layers")
    other = 0
    for head in heads:
        matrix = head.name.removesuffix(".weight") if head.name.endswith(".weight") else head.name.rpartition(".")[0]
        number = LAYER_INDEX.search(head.name)
        if matrix in ours or head.name in ours or (layers and number and int(number[1]) >= layers):
            continue
        other += prod(head.shape) * (2 if head.dtype in _FLOATS else DTYPE_BYTES[head.dtype])
    return Weights(plan.nbytes, other)


def cache_bytes(config: Mapping[str, Any]) -> int | None:
    """Bytes of the key-value cache a token takes in all layers, at two bytes a number; None if the config is unusual.

    Attention with a latent (DeepSeek) keeps one vector of `kv_lora_rank + qk_rope_head_dim` numbers a layer.
    """
    text = _text_config(config)
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    if not layers or not heads:
        return None
    if text.get("kv_lora_rank"):
        return int(2 * layers * (text["kv_lora_rank"] + text["qk_rope_head_dim"]))
    width = text.get("head_dim") or text["hidden_size"] // heads
    return int(2 * layers * 2 * (text.get("num_key_value_heads") or heads) * width)


@dataclass(frozen=True)
class Card:
    """A GPU: name, memory in bytes, compute capability."""

    name: str
    memory: int
    capability: tuple[int, int]


def cards() -> list[Card]:
    """The GPUs that vLLM would see."""
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [Card(each.name, each.total_memory, (each.major, each.minor)) for each in found]


def check_memory(needed: Weights, given: Mapping[str, str], present: Sequence[Card]) -> str:
    """Compare the weights with the smallest card.

    Returns:
        A line that says what a GPU holds, and what is left of it for the cache and everything else.

    Raises:
        DeviceError: the weights alone do not fit; it says by how much they miss, and what would help.
    """
    share = _number(given, "tensor-parallel-size", 1) * _number(given, "pipeline-parallel-size", 1)
    if "enable-expert-parallel" in given:
        share *= _number(given, "data-parallel-size", 1)
    part = needed.total / share
    card = min(present, key=lambda each: each.memory)
    used = 1.0 if "kv-cache-memory-bytes" in given else _number(given, "gpu-memory-utilization", UTILISATION)
    room = used * card.memory
    each = f" on each of {share:g} GPUs" if share > 1 else ""
    size = f"{used:g} of {card.name}'s {card.memory / 2**30:.2f} GiB"
    what = f"{part / 2**30:.2f} GiB of weights{each}; vLLM may use {size}"
    if part >= room:
        enough = int(-(-needed.total // room))
        raise DeviceError(
            f"{what}, so {(part - room) / 2**30:.2f} GiB are missing before any cache: pass --tensor-parallel-size "
            f"{1 << (enough - 1).bit_length()} (or more), or compress further (`milo plan MODEL --budget ...`)"
        )
    return f"{what}: {(room - part) / 2**30:.2f} GiB are left for the cache and the work in progress"


def missing(present: Sequence[Card]) -> list[str]:
    """What this environment lacks to serve a folder, each with the remedy; empty if nothing."""
    found = []
    if importlib.util.find_spec("vllm") is None:
        found.append("vLLM is not installed: `pip install 'milo-moe[vllm]'`")
    else:
        version = vllm_version()
        if not supported(version):
            found.append(
                f"vLLM {version} is not one that MiLo was tested with ({RANGE}): `pip install 'milo-moe[vllm]'`"
            )
        if not any(each.name == PLUGIN for each in importlib.metadata.entry_points(group=PLUGIN_GROUP)):
            found.append(
                f"vLLM would not find MiLo (no entry point {PLUGIN} in {PLUGIN_GROUP}): install milo-moe in this "
                "environment, again if it was installed from a checkout of an earlier version"
            )
        allowed = os.environ.get("VLLM_PLUGINS")  # vLLM's own allow-list
        if allowed is not None and PLUGIN not in allowed.split(","):
            found.append(f"VLLM_PLUGINS={allowed} keeps vLLM from loading MiLo: add {PLUGIN} to it or unset it")
    if not present:
        cause = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        found.append(f"no GPU: {cause}; `milo generate` runs without one")
    elif torch.cuda.is_available():
        runs, reason = decode.supports(torch.device("cuda"), torch.bfloat16)
        if not runs:
            found.append(f"our kernels do not run here: {reason}; `milo doctor` tells more")
    for card in present:
        if card.capability < MIN_CAPABILITY:
            is_, least = (".".join(map(str, pair)) for pair in (card.capability, MIN_CAPABILITY))
            found.append(
                f"{card.name} has compute capability {is_}, our kernels need {least}: hide it with CUDA_VISIBLE_DEVICES"
            )
    return found


def vllm_version() -> str:
    """The installed vLLM's version, without importing it (which takes seconds)."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def check_kernels(plan: Plan) -> None:
    """Whether there are kernels for every matrix of the plan; vLLM has no slow path to fall back to.

    Raises:
        MiloError: there are none for one of them.
    """
    for row in plan.rows:
        n, k = row.shape
        whole = max(layout.TILE, row.encoding.group_size) if row.encoding.planes > 1 else 1  # the plugin pads to it
        fits, reason = layout.supports(row.encoding, (n, k + -k % whole))
        if fits and row.role is Role.EXPERT and row.encoding.planes > 1:
            fits, reason = False, f"experts with codes of {row.encoding.bits} bits are not supported"
        if not fits:
            raise MiloError(
                f"{row.name}: {reason} by our kernels; compress with --bits 3 or 4 and --factor int3 to serve it, or "
                "use it in transformers as it is"
            )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def _number(given: Mapping[str, str], name: str, default: float) -> float:
    """An option's value; the default where it is absent or nonsense, of which vLLM itself will complain."""
    try:
        value = float(given.get(name, default))
    except ValueError:
        return default
    return value if value > 0 else default
