"""A layer's description without its weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def prepare_layer_config(
    n: int, k: int, schema: dict[str, Any], num_experts: int | None, torch_dtype: torch.dtype
) -> Any:
    return SimpleNamespace(to_str=lambda: f"{schema['dtype']} {num_experts or 1}x{n}x{k}")
