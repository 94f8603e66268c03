"""What peers lack of an FFN: the gated activation between their two products, and the weighted sum after them.

One Triton kernel each, which is what `torch.compile` would make of the expressions, without its start-up time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _silu_and_mul(x, out, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(x + 2 * row * inner + column, inside, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * inner + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), inside)


@triton.jit
def _weighted_sum(y, place, weights, out, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice).to(tl.int64)
        weight = tl.load(weights + token * CHOICES + choice)
        total += weight * tl.load(y + row * width + column, inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), inside)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`silu(x[:, :I]) · x[:, I:]`: `[P, 2 I]` to `[P, I]`."""
    rows, inner = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, inner)
    _silu_and_mul[rows, triton.cdiv(inner, BLOCK)](x, out, inner, BLOCK=BLOCK)
    return out


def weighted_sum(y: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`Σₖ weights[t, k] · y[place[t, k]]`: `[P, H]`, int32 `[T, k]` and float32 `[T, k]` to `[T, H]`."""
    (tokens, choices), width = place.shape, y.shape[1]
    out = y.new_empty(tokens, width)
    grid = tokens, triton.cdiv(width, BLOCK)
    _weighted_sum[grid](y, place, weights, out, width, CHOICES=choices, BLOCK=BLOCK)
    return out
