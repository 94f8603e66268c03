"""Sorting pairs by expert, in blocks that belong to one expert each."""

from __future__ import annotations

import torch


def generate_moe_tensors(
    topk_ids: torch.Tensor, num_experts: int, gemm_type: str, block_size_config: int
) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert gemm_type == "indexed"
    assert topk_ids.dtype == torch.int32
    order: list[int] = []
    experts: list[int] = []
    for expert in range(num_experts):
        pairs = (topk_ids.flatten() == expert).nonzero().flatten().tolist()
        pairs += [topk_ids.numel()] * (-len(pairs) % block_size_config)
        order += pairs
        experts += [expert] * (len(pairs) // block_size_config)
    return topk_ids, None, torch.tensor(order), torch.tensor(experts), torch.tensor(len(order))
