"""What the serving benchmark adds to vLLM's worker; on a CPU, where vLLM is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]


@pytest.fixture(scope="module")
def worker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
        import serve
        import serve_worker

        assert (serve.FILLED, serve.HUMMING) == (serve_worker.FILLED, serve_worker.HUMMING3)
        yield serve_worker


class Layer(nn.Module):
    """Parameters as vLLM's quantised layers have them: codes, scales, an unused order, and locks of zeros."""

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in (("qweight", torch.int32), ("g_idx", torch.int32), ("scales", torch.bfloat16)):
            setattr(self, name, nn.Parameter(torch.zeros(64, 64, dtype=dtype), requires_grad=False))
        self.register_buffer("locks", torch.zeros(64, dtype=torch.int32))
        self.w13_weight = self.qweight  # a second name of the same tensor


def test_integers_are_filled_and_nothing_else_is_touched(worker: ModuleType) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    model = nn.ModuleDict({"layer": Layer()})
    loader = get_model_loader(LoadConfig(load_format=worker.FILLED))
    loader.load_weights(model, SimpleNamespace())
    layer: Any = model["layer"]
    assert layer.qweight.unique().numel() > 4000
    assert (layer.qweight < 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert 0 < layer.scales.abs().max() <= 1e-3
    assert not layer.locks.any()
    assert not layer.g_idx.any()


def test_memory_counts_every_storage_once(worker: ModuleType) -> None:
    experts, head = Layer(), nn.Linear(4, 2, bias=False)
    model = nn.ModuleDict({"x": nn.ModuleDict({"experts": nn.ModuleDict({"w": experts})}), "lm_head": head})
    cache = torch.zeros(10)
    probe = worker.Probe()
    probe.get_model, probe.model_runner = lambda: model, SimpleNamespace(kv_caches=[cache, cache[:5]])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
            patch.setattr(torch.cuda, name, lambda: 7)
        found = probe.bench_memory()
    assert found["weights"] == {"experts": 64 * 64 * (4 + 4 + 2) + 64 * 4, "head": 32}
    assert (found["cache"], found["allocated"]) == (40, 7)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.mlp.experts.routed_experts.w13_qweight", "experts"),
        ("model.layers.0.mlp.experts.routed_experts.milo_down.codes", "experts"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.self_attn.qkv_proj.qweight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.self_attn.rotary_emb.cos_sin_cache", "tables"),
        ("model.layers.0.mlp.shared_experts.gate_up_proj.weight", "shared experts"),
        ("model.layers.0.mlp.gate_up_proj.weight", "dense FFN"),
        ("lm_head.weight", "head"),
    ],
)
def test_roles(worker: ModuleType, name: str, role: str) -> None:
    assert worker.role_of(name) == role
