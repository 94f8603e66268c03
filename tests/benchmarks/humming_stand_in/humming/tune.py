"""Two configurations, for few rows and for many."""

from __future__ import annotations

from typing import Any


def get_heuristics_config(layer_config: Any, shape_m: int, gemm_type: str) -> dict[str, Any]:
    assert gemm_type in ("indexed", "dense")
    return {"block_shape": (2 if shape_m <= 8 else 8, 64, 64)}
