"""Operators on compressed matrices, for anybody: nothing here knows a model.

`repack` turns the format's tensors into the kernels' layout once, on the device, and `stack` makes one matrix of
several (q, k and v); `linear` and `moe_ffn` multiply by them without ever expanding the weights. Both are
`torch.library` custom operators (`torch.ops.milo.linear`, `torch.ops.milo.moe_ffn`) with fake implementations: they
work under `torch.compile` and in CUDA graphs, never synchronise, and give the same bits at every run. On a CPU, or for
activations the kernels do not take, they compute the same function in plain PyTorch.

There are two families of kernels, for few and for many tokens an expert; which one runs follows from shapes alone.
The first call of a kind (dtype, bits, group size, range of tokens) compiles for a few seconds unless the cache on disk
has it; make it before a graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from milo.kernels import decode, packed_reference, prefill
from milo.kernels.layout import PackedMatrix, repack
from milo.kernels.stacking import apart, stack

__all__ = ["PackedMatrix", "linear", "moe_ffn", "repack", "stack"]


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`y = x · Ŵᵀ + bias`, compensator included.

    Args:
        x: `[..., K]`, float16 or bfloat16 (any floating dtype on a CPU).
        weight: one matrix, from `repack`, or several over their out-features, from `stack`.
        bias: `[N]` in the dtype of `x`, or None.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    if weight.parts != 1 or weight.codes.shape[0] != 1:
        raise ValueError("linear takes one matrix; a stack of experts goes to moe_ffn")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the matrix takes {weight.in_features}")
    if bias is not None and (bias.shape != (weight.out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is [{weight.out_features}] in the dtype of x, got {tuple(bias.shape)} {bias.dtype}")
    y = _linear(x.reshape(-1, x.shape[-1]), weight.tensors, weight.numbers, bias)
    return y.reshape(*x.shape[:-1], weight.out_features)


def moe_ffn(
    x: torch.Tensor,
    gate_up: PackedMatrix,
    down: PackedMatrix,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """A whole MoE feed-forward: `Σₖ wₖ · down(act(gate(x)) · up(x))` over each token's chosen experts.

    Args:
        x: `[T, H]`, float16 or bfloat16 (any floating dtype on a CPU).
        gate_up: the experts' gate and up projections, two parts, from `repack`.
        down: their down projections, one part.
        topk_ids: `[T, k]` int32 or int64. An id outside the experts here contributes nothing.
        topk_weights: `[T, k]` float32, float16 or bfloat16.
        activation: of the gate: `silu`, `gelu_tanh` or `gelu`.
        expert_map: `[global experts]` int32, the local number of each or -1; None if ids are local already.

    Returns:
        `[T, H]` in the dtype of `x`.

    Raises:
        ValueError: if shapes, dtypes or the activation do not fit.
    """
    if activation not in packed_reference.ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(packed_reference.ACTIVATIONS)}, not {activation!r}")
    if gate_up.parts != 2 or down.parts != 1 or gate_up.codes.shape[0] != down.codes.shape[0]:
        raise ValueError("gate_up has two parts, down one, and both hold the same experts")
    if gate_up.planes != 1 or down.planes != 1:
        raise ValueError("experts have codes of 3 or 4 bits; wider ones go through linear")
    if x.dim() != 2 or x.shape[1] != gate_up.in_features or down.in_features != gate_up.out_features:
        raise ValueError(f"x {tuple(x.shape)}, gate_up and down do not fit together")
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[:1] != x.shape[:1] or topk_ids.dim() != 2:
        raise ValueError(f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} are [T, k]")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids are int32 or int64, not {topk_ids.dtype}")
    if expert_map is not None and (expert_map.dtype != torch.int32 or expert_map.dim() != 1):
        raise ValueError("expert_map is a vector of int32")
    return _moe_ffn(
        x, gate_up.tensors, gate_up.numbers, down.tensors, down.numbers, topk_ids, topk_weights, activation, expert_map
    )


@torch.library.custom_op("milo::linear", mutates_args=())
def _linear(
    x: torch.Tensor, weight: Sequence[torch.Tensor], numbers: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor:
    matrix = PackedMatrix.of(weight, numbers)
    tokens, bias = x.shape[0], None if bias is None else bias.contiguous()
    if not tokens or not decode.supports(x.device, x.dtype)[0]:
        return _apart(packed_reference.linear, x, matrix, bias)
    many = prefill.prefers_linear(tokens, matrix.codes.shape[1], max(1, len(matrix.stack)))
    if many and prefill.supports(x.device, x.dtype)[0]:
        return _apart(prefill.linear, _aligned(x), matrix, bias)
    return decode.linear(_aligned(x), matrix, bias)


def _apart(
    linear: Callable[..., torch.Tensor], x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None
) -> torch.Tensor:
    """Stacked matrices one by one, where launches do not count."""
    matrices = apart(matrix)
    biases = [None] * len(matrices) if bias is None else bias.split([m.out_features for m in matrices])
    parts = [linear(x, m, b) for m, b in zip(matrices, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@_linear.register_fake
def _(
    x: torch.Tensor, weight: Sequence[torch.Tensor], numbers: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], numbers[0])


@torch.library.custom_op("milo::moe_ffn", mutates_args=())
def _moe_ffn(
    x: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    gate_up_numbers: Sequence[int],
    down: Sequence[torch.Tensor],
    down_numbers: Sequence[int],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    first, second = PackedMatrix.of(gate_up, gate_up_numbers), PackedMatrix.of(down, down_numbers)
    arguments = (topk_ids.contiguous(), topk_weights.contiguous(), activation, expert_map)
    (tokens, topk), experts = topk_ids.shape, first.codes.shape[0]
    if not tokens or not decode.supports(x.device, x.dtype, experts, topk)[0]:
        return packed_reference.moe_ffn(x, first, second, *arguments)
    chosen_from = experts if expert_map is None else expert_map.shape[0]
    many = prefill.prefers(tokens, topk, chosen_from) and prefill.supports(x.device, x.dtype, experts, topk)[0]
    return (prefill if many else decode).moe_ffn(_aligned(x), first, second, *arguments)


@_moe_ffn.register_fake
def _(
    x: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    gate_up_numbers: Sequence[int],
    down: Sequence[torch.Tensor],
    down_numbers: Sequence[int],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], down_numbers[0])


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, contiguous and on a 16-byte boundary, as the kernels' copies need it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
