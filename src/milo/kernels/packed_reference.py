"""Operations on the kernels' layout in plain PyTorch: what the operators do on a CPU, and the layout's inverse."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from milo.kernels.layout import TILE, PackedMatrix

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def dequantize(weight: PackedMatrix, expert: int) -> torch.Tensor:
    """`Ŵ = scale · (code − zero) + U · V` of one expert, float32 `[parts · N, K]`, parts one after the other."""
    rows = _weights(weight, weight.codes[expert], weight.meta[expert], weight.group_size)
    first, tiles, at, steps = weight.table[expert].tolist()
    runs = TILE // weight.parts
    rows = rows.unflatten(0, (-1, weight.parts, runs)).transpose(0, 1).flatten(1, 2)  # [parts, N padded, K]
    if steps:
        chosen = slice(first, first + tiles)
        v = _weights(weight, weight.v_codes[chosen], weight.v_meta[chosen], min(weight.group_size, TILE))
        v = v[: weight.parts * steps * 16].unflatten(0, (weight.parts, -1))
        row_tiles = weight.codes.shape[1]
        words = weight.u_codes[at : at + row_tiles * steps].permute(0, 2, 1)
        codes = _codes(words, 3).unflatten(0, (row_tiles, steps))  # tile step lane pair e
        codes = codes.reshape(row_tiles, steps, 8, 4, 4, 2, 2, 2)  # tile step g q mt c rh e
        codes = codes.permute(0, 4, 6, 2, 1, 5, 3, 7).reshape(row_tiles, TILE, steps * 16).float() - 4
        scales = weight.u_scales[at : at + row_tiles * steps].float().unflatten(0, (row_tiles, steps))
        scales = scales.permute(0, 2, 1, 3).flatten(2)  # tile part rank
        u = codes.unflatten(1, (weight.parts, runs)) * scales[:, :, None]
        rows = rows + u.transpose(0, 1).flatten(1, 2) @ v
    return rows[:, : weight.out_features].flatten(0, 1)


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


def _weights(weight: PackedMatrix, codes: torch.Tensor, meta: torch.Tensor, group_size: int) -> torch.Tensor:
    """`[row tiles, ...]` codes and metadata to float32 `[rows padded, K]`."""
    row_tiles, k_tiles = codes.shape[:2]
    values = _codes(codes.permute(0, 1, 3, 4, 2), weight.bits)  # tile kt lane mt pair e
    values = values.reshape(row_tiles, k_tiles, 8, 4, 4, 2, 2, 2, 2, 2)  # tile kt g q mt half sub c rh e
    values = values.permute(0, 4, 8, 2, 1, 5, 3, 6, 7, 9).reshape(row_tiles * TILE, k_tiles * TILE).float()
    halves = 2 if group_size == 32 else 1
    numbers = meta.float().reshape(row_tiles, meta.shape[1], halves, 8, 4, 2, 2)  # tile record half g mt rh sz
    numbers = numbers.permute(0, 4, 5, 3, 1, 2, 6).reshape(row_tiles * TILE, -1, 2)
    numbers = numbers.repeat_interleave(group_size, 1)[:, : values.shape[1]]
    return ((values - numbers[..., 1]) * numbers[..., 0])[:, : weight.in_features]


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of the layout's words: int32 `[..., bits]` to `[..., 16, 2]`."""
    a_word, mask = (5, 7) if bits == 3 else (4, 15)
    pairs = []
    for j in range(bits):
        for p in range(a_word):
            pairs.append(torch.stack([(words[..., j] >> (bits * p + 16 * e)) & mask for e in range(2)], -1))
    if bits == 3:
        spread = torch.stack([(words >> (15 + 16 * e)) & 1 for e in range(2)], -1)  # a bit of the code in each word
        pairs.append(spread[..., 0, :] | spread[..., 1, :] << 1 | spread[..., 2, :] << 2)
    return torch.stack(pairs, -2)
