"""A layer that multiplies by weights rounded to the format's bits."""

from __future__ import annotations

import json
from typing import Any

import torch


class HummingLayer(torch.nn.Module):
    def __init__(
        self,
        shape_n: int,
        shape_k: int,
        weight_config: dict[str, Any],
        num_experts: int | None,
        torch_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.experts = weight_config, num_experts
        self.humming_config: tuple[Any, ...] | None = None
        self.register_buffer("weight", torch.empty(num_experts or 1, shape_n, shape_k, dtype=torch_dtype))

    def load_from_unquantized(self, weight: torch.Tensor) -> None:
        groups = weight.reshape(*self.weight.shape[:2], -1, 32).float()  # finer than the format's: any size is whole
        low, high = groups.aminmax(dim=-1, keepdim=True)
        step = (high - low) / (2 ** int(self.config["dtype"].removeprefix("uint")) - 1)
        self.weight.copy_((((groups - low) / step).round() * step + low).view_as(self.weight))

    def transform(self) -> None:
        self.humming_config = (*self.weight.shape, self.config["dtype"])

    def forward(
        self,
        inputs: torch.Tensor,
        sorted_ids: torch.Tensor | None = None,
        expert_ids: torch.Tensor | None = None,
        num_tokens_padded: torch.Tensor | None = None,
        top_k: int = 1,
        compute_config: str = "",
        tuning_config: str = "",
        valid_shape_m: int = 0,
    ) -> torch.Tensor:
        if json.loads(compute_config)["gemm_type"] == "dense":
            return inputs @ self.weight[0].T
        block = json.loads(tuning_config)["block_shape"][0]
        assert sorted_ids is not None
        assert expert_ids is not None
        assert num_tokens_padded == len(sorted_ids) == block * len(expert_ids)
        assert inputs.shape[0] * top_k == valid_shape_m
        out = inputs.new_full((valid_shape_m, self.weight.shape[1]), float("nan"))
        for pairs, expert in zip(sorted_ids.split(block), expert_ids.tolist(), strict=True):
            pairs = pairs[pairs < valid_shape_m].long()
            out[pairs] = inputs[pairs // top_k] @ self.weight[expert].T
        return out
