"""Operations on the kernels' layout in plain PyTorch: what the operators do on a CPU, and the kernels' oracle."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from milo.kernels.layout import FACTOR_ZERO, TILE, PackedMatrix
from milo.kernels.unpack import u_factor, v_factor, weight_codes, weight_meta

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def dequantize(weight: PackedMatrix, expert: int) -> torch.Tensor:
    """`Ŵ = scale · (code − zero) + U · V` of one expert, float32 `[parts · N, K]`, parts one after the other."""
    codes, meta = weight_codes(weight, expert), weight_meta(weight, expert).float()
    meta = meta.repeat_interleave(weight.group_size, 2)[:, :, : codes.shape[2]]
    rows = (codes.float() - meta[..., 1]) * meta[..., 0]
    codes, scales = u_factor(weight, expert)
    if codes.shape[2]:
        u = (codes.float() - FACTOR_ZERO) * scales.float().repeat_interleave(TILE // weight.parts, 1)
        codes, scales = v_factor(weight, expert)
        v = (codes.float() - FACTOR_ZERO) * scales.float().repeat_interleave(TILE, 2)[..., : codes.shape[2]]
        rows += u @ v
    rows = rows[:, : weight.out_features].unflatten(2, (weight.planes, -1)).sum(2)
    return rows[..., : weight.in_features].flatten(0, 1)


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    """`x · Ŵᵀ + bias` in float32, rounded to the dtype of `x`."""
    y = F.linear(x.float(), dequantize(weight, 0), None if bias is None else bias.float())
    return y.to(x.dtype)


def moe_ffn(
    x: torch.Tensor,
    gate_up: PackedMatrix,
    down: PackedMatrix,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """The MoE FFN in float32, an expert at a time; only `h` is rounded to the dtype of `x`, as the kernel does."""
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.shape[0])
        ids = torch.where(known, expert_map.long()[ids.clamp(0, expert_map.shape[0] - 1)], -1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.codes.shape[0]):
        token, choice = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        gate, up = F.linear(x[token].float(), dequantize(gate_up, expert)).chunk(2, -1)
        h = (activate(gate, activation) * up).to(x.dtype).float()
        y = F.linear(h, dequantize(down, expert))
        out.index_add_(0, token, y * topk_weights[token, choice, None].float())
    return out.to(x.dtype)


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
