"""vLLM's quantisation config of a compressed folder: the plan, looked up by the names of vLLM's modules.

A module of vLLM may stand for several stored matrices (`qkv_proj`, `gate_up_proj`, the experts); which ones, the model
class says itself (`packed_modules_mapping`, the checkpoint names of its experts, `hf_to_vllm_mapper`). What has a row
in the plan gets our method, everything else vLLM's own.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from milo.checkpoint.compressed import CompressedCheckpoint, plan_from_config
from milo.checkpoint.roles import LAYER_INDEX
from milo.errors import ServingError
from milo.format.shards import Span
from milo.integrations.vllm.base import BaseConfig
from milo.integrations.vllm.names import NamingMapper, Stack
from milo.integrations.vllm.pieces import share
from milo.plan.plan import Plan, Row

# What vLLM calls a layer that it merged, where a model class does not list it.
_MERGED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)


@dataclass(frozen=True)
class Source:
    """Where one part of a layer's weight is stored.

    Attributes:
        name: of the stored matrix, as vLLM's loaders see it.
        row: of the plan; None for a part that is not compressed.
        first: where the part begins among the stored out-features.
        size: out-features of the part; None for all.
    """

    name: str
    row: Row | None
    first: int = 0
    size: int | None = None

    def rows(self, size: int, rank: int, ranks: int) -> Span:
        """Stored out-features of one rank (see `share`)."""
        assert self.row is not None
        own = share(self.name, "out-features", self.size or self.row.shape[0], size, rank, ranks)
        return Span(self.first + own.begin, self.first + own.end, self.row.shape[0])


class MiloQuantizationConfig(BaseConfig):
    """The plan of a compressed folder, for vLLM.

    Args:
        plan: checked already.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.rows = {row.matrices()[0]: row for row in plan.rows}
        self._mappers: list[Any] = []
        self._claimed: set[str] = set()
        self._stacks: dict[str, Stack] = {}
        self._heads: list[str] = []
        self._unnamed = self._checked = self._tied = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MiloQuantizationConfig:
        """From the `quantization_config` of a `config.json`.

        Raises:
            FormatError: a newer format, or a plan that was altered.
        """
        return cls(plan_from_config(config, "the model's config.json"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called once at start, with the folder: look into every file's header before anything is loaded.

        Raises:
            CheckpointError: unfinished, truncated, or tensors missing.
            FormatError: shards of another plan, tensors that are not what the plan says.
            ServingError: the kernels cannot be compiled here.
        """
        text = getattr(hf_config, "text_config", None) or hf_config
        self._tied = bool(getattr(text, "tie_word_embeddings", False))
        if torch.version.hip is not None:
            raise ServingError("MiLo's kernels need an NVIDIA GPU; this PyTorch is built for ROCm")
        if torch.version.cuda is not None and importlib.util.find_spec("cuda.bindings") is None:
            raise ServingError("MiLo's kernels need the package cuda-bindings: pip install cuda-bindings")
        # A folder without weights is for --load-format dummy; vLLM itself refuses any other use of it.
        if Path(model_name).is_dir() and any(Path(model_name).glob("*.safetensors")):
            CompressedCheckpoint(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the plan's rows as vLLM's model class renames the checkpoint's tensors."""
        if hf_to_vllm_mapper in self._mappers:
            return
        self._mappers.append(hf_to_vllm_mapper)
        suffix = ".weight"  # mappers may look for it
        renamed = {name: hf_to_vllm_mapper.apply_list([name + suffix]) for name in self.rows}
        self.rows = {new[0].removesuffix(suffix): self.rows[old] for old, new in renamed.items() if new}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for a layer that the plan compresses, vLLM's for any other.

        Args:
            layer: of vLLM.
            prefix: its dotted path.

        Raises:
            ServingError: a layer that the kernels do not take.
        """
        from milo.integrations.vllm.experts import MiloExpertsMethod
        from milo.integrations.vllm.linear import MiloLinearMethod

        if isinstance(layer, LinearBase):
            if not prefix:  # vLLM does not say which layer it is: its tensors will
                self._unnamed = True
                return MiloLinearMethod(self, None)
            sources = self.sources(prefix)
            return MiloLinearMethod(self, sources) if any(s.row for s in sources) else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            sources = self.experts(
                prefix, layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
            )
            if any(source.row for source in sources):
                return MiloExpertsMethod(self, layer.moe_config, prefix, sources)
        if isinstance(layer, ParallelLMHead) and self._tied:
            self._heads.append(prefix)
        return None

    def sources(self, prefix: str) -> list[Source]:
        """The stored matrices behind a linear layer, in the order of its parts."""
        if prefix in self.rows:
            names = [prefix]
        else:
            parent, dot, leaf = prefix.rpartition(".")
            parts = self._merged.get(leaf) or [leaf]
            names = [f"{parent}{dot}{part}" for part in parts]
        self._claimed.update(names)
        return [Source(name, self.rows.get(name)) for name in names]

    def layer_of(self, matrix: str) -> str:
        """Path of the layer that a stored matrix belongs to, as vLLM merges them."""
        parent, dot, leaf = matrix.rpartition(".")
        merged = next((layer for layer, parts in self._merged.items() if leaf in parts), leaf)
        return f"{parent}{dot}{merged}"

    def experts(self, prefix: str, gate: str, up: str, down: str) -> list[Source]:
        """The stored matrices of gate, up and down of a layer's experts."""
        sources, fused = [], self.rows.get(f"{prefix}.gate_up_proj")
        for position, name in enumerate((gate, up, down)):
            stack = fused if position < 2 and fused else self.rows.get(f"{prefix}.{name}")
            if stack is None:
                listed = f"{prefix}.0.{name}"
                self._claimed.add(listed)
                sources.append(Source(listed, self.rows.get(listed)))
                continue
            half = stack.shape[0] // 2
            sources.append(Source(stack.name, stack, *((position * half, half) if stack is fused else ())))
            parent, _, leaf = stack.name.rpartition(".")
            self._claimed.add(f"{prefix}.{leaf}")
            self._stacks.setdefault(stack.name, Stack(stack, [])).names.append(f"{parent}.{{}}.{name}")
        return sources

    def get_cache_scale_mapper(self) -> NamingMapper:
        """The mapper through which vLLM sends every tensor of the checkpoint."""
        vllms = vars(QuantizationConfig.get_cache_scale_mapper())
        return NamingMapper(**vllms, stacks=self._stacks, heads=self._heads)

    @property
    def _merged(self) -> dict[str, Sequence[str]]:
        return {**_MERGED, **self.packed_modules_mapping}

    def check_complete(self) -> None:
        """Called when loading begins: whether every matrix of the layers that are here has found its module.

        A matrix without one would be left out without a word, or end in an error far from its cause.

        Raises:
            ServingError: vLLM's model has another structure than the checkpoint.
        """
        if self._checked or self._unnamed:  # matrices of layers without a name are claimed when they come
            return
        self._checked = True
        here = {_layer(name) for name in self._claimed}  # a pipeline stage has some of the layers only
        for name in self.rows:
            if name not in self._claimed and _layer(name) in here:
                raise ServingError(
                    f"vLLM's model has no module for {name}, which is compressed in this folder; serve it with "
                    "another vLLM version or through transformers, and please report it"
                )


def _layer(name: str) -> str | None:
    match = re.search(LAYER_INDEX, name)
    return match[1] if match else None
