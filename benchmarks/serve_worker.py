"""What `benchmarks/serve.py` adds to vLLM: dummy weights whose integers are filled, Humming's INT3 experts, a scale.

vLLM's dummy loader leaves integer parameters as they were allocated. Here they get random bits before vLLM moves them
to its kernels' layout: every pattern of four-bit (GPTQ) or three-bit (Humming) codes is a valid one. Named as vLLM's
`worker_extension_cls`, this module is imported in every worker before the model is loaded.

vLLM 0.26 passes 3-bit linear layers to Humming, but among the schemes of its Humming experts 3 bits are not listed
(0.33 has them), so `--quantization humming` stops at the first MoE layer. `Humming3Config` names the kernel that it
would choose for other widths; the kernel itself is Humming's, unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.experts.fused_humming_moe import HummingIndexedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.humming import HummingConfig, HummingMoEMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

FILLED, HUMMING3 = "dummy-filled", "humming3"
_ROLES = (  # part of a tensor's name, role; the first that is found
    ("rotary", "tables"), ("norm", "norms"), (".shared_expert", "shared experts"), (".experts.", "experts"),
    ("attn", "attention"), ("embed_tokens", "embedding"), ("lm_head", "head"), (".mlp.", "dense FFN"),
)  # fmt: skip


@register_model_loader(FILLED)
class FilledModelLoader(DummyModelLoader):
    """vLLM's dummy weights, integers included; the floats are vLLM's own, the same for every system."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        super().load_weights(model, model_config)
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.int32 and "g_idx" not in name:  # an order of columns, which is not used
                parameter.data.random_(-(2**31), 2**31 - 1)


@register_quantization_config(HUMMING3)
class Humming3Config(HummingConfig):
    """vLLM's Humming, with its kernel for indexed experts where it knows none for the width."""

    @classmethod
    def get_name(cls) -> str:
        return HUMMING3

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, HummingMoEMethod) and method.experts_cls is None:
            method.experts_cls = HummingIndexedExperts
        return method


def role_of(name: str) -> str:
    """Role of a parameter of vLLM's model, by its name."""
    if name.endswith(".gate.weight"):
        return "router"
    return next((role for part, role in _ROLES if part in name), "other")


def held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a model keeps, once: two names of one storage are one tensor."""
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield name, tensor


class Probe:
    """Methods of the worker, which has `get_model` and `model_runner`."""

    get_model: Any
    model_runner: Any

    def bench_memory(self) -> dict[str, Any]:
        """Bytes on this worker's GPU: weights by role, key-value cache, all that PyTorch holds."""
        weights: Counter[str] = Counter()
        for name, tensor in held(self.get_model()):
            weights[role_of(name)] += tensor.untyped_storage().nbytes()
        caches = {cache.untyped_storage().data_ptr(): cache for cache in self.model_runner.kv_caches}
        return {
            "weights": dict(weights),
            "cache": sum(cache.untyped_storage().nbytes() for cache in caches.values()),
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "peak": torch.cuda.max_memory_allocated(),
        }
