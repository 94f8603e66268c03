"""Two ranges of rows."""

from __future__ import annotations

from typing import Any


def get_heuristics_config(layer_config: Any, gemm_type: str) -> list[tuple[int, int, dict[str, Any]]]:
    assert gemm_type in ("indexed", "dense")
    return [(0, 8, {"block_shape": (2, 64, 64)}), (8, 1 << 30, {"block_shape": (8, 64, 64)})]
