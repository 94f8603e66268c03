"""Reference operations in plain PyTorch: correct on every device, the oracle for every faster kernel.

A compressed matrix is passed as the mapping of its tensors, named as in the format (`weight_packed`,
`weight_scale`, ..., see `milo.format.matrix`). Weights are rebuilt in float32 and rounded once, to the dtype of the
activations; the compensator is applied as two thin products, so its rank costs `r·(N + K)` and not `N·K`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from milo.format.codes import unpack_bytes, unpack_words
from milo.format.matrix import FACTOR_BITS, FACTOR_GROUP, Encoding

Tensors = Mapping[str, torch.Tensor]


def scales(tensors: Tensors, encoding: Encoding, groups: int) -> torch.Tensor:
    """Group scales in float32, `[..., N, groups]`."""
    stored = tensors["weight_scale"]
    if encoding.scale_bits == 16:
        return stored.float()
    fraction = unpack_bytes(stored, encoding.scale_bits, groups).float() * encoding.scale_step
    return fraction * tensors["weight_super_scale"].float()[..., None]


def zeros(tensors: Tensors, encoding: Encoding, groups: int) -> torch.Tensor:
    """Group zeros in float32, in units of codes, `[..., N, groups]`."""
    stored = tensors["weight_zero"]
    if encoding.zero_bits == 16:
        return stored.float()
    return unpack_bytes(stored, encoding.zero_bits, groups).float() * encoding.zero_step


def codes(tensors: Tensors, encoding: Encoding, in_features: int) -> torch.Tensor:
    """Weight codes, uint8 `[..., N, K]`."""
    low = unpack_words(tensors["weight_packed"], encoding.plane_bits, in_features)
    if encoding.planes == 1:
        return low
    high = unpack_words(tensors["weight_packed_hi"], encoding.plane_bits, in_features)
    return low | (high << encoding.plane_bits)


def dequantize(tensors: Tensors, encoding: Encoding, in_features: int) -> torch.Tensor:
    """The quantised part `scale · (code − zero)`, without the compensator.

    Returns:
        float32 `[..., N, K]`.
    """
    groups, size = encoding.groups(in_features), encoding.group_size
    weight = codes(tensors, encoding, in_features).float()
    tail = groups * size - in_features
    grouped = F.pad(weight, (0, tail)).unflatten(-1, (groups, size))
    zero, scale = zeros(tensors, encoding, groups), scales(tensors, encoding, groups)
    return grouped.sub_(zero[..., None]).mul_(scale[..., None]).flatten(-2)[..., :in_features]


def factor(tensors: Tensors, encoding: Encoding, name: str, length: int) -> torch.Tensor | None:
    """One factor of the compensator in float32: `name` is `lowrank_u` (`Uᵀ [r, N]`) or `lowrank_v` (`V [r, K]`).

    Returns:
        float32 `[r, length]`, or None for rank 0.
    """
    stored = tensors.get(name)
    if stored is None or stored.shape[0] == 0:
        return None
    bits = FACTOR_BITS[encoding.factor]
    if bits == 16:
        return stored.float()
    centred = unpack_words(stored, bits, length).float().sub_(2 ** (bits - 1))
    scale = tensors[name + "_scale"].float().repeat_interleave(FACTOR_GROUP, dim=-1)[..., :length]
    return centred.mul_(scale)


def reconstruct(tensors: Tensors, encoding: Encoding, shape: tuple[int, int]) -> torch.Tensor:
    """The whole matrix `Ŵ = dequantised + U·V`, float32 `[N, K]`."""
    weight = dequantize(tensors, encoding, shape[1])
    u = factor(tensors, encoding, "lowrank_u", shape[0])
    v = factor(tensors, encoding, "lowrank_v", shape[1])
    return weight if u is None or v is None else weight.addmm_(u.T, v)


def linear(
    x: torch.Tensor,
    tensors: Tensors,
    encoding: Encoding,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y = x · Ŵᵀ + bias` for one compressed matrix.

    Args:
        x: activations `[..., K]`, any floating dtype.
        tensors: the matrix's tensors.
        encoding: how they are written.
        shape: `(N, K)`.
        bias: `[N]` or None.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    y = F.linear(x, dequantize(tensors, encoding, shape[1]).to(x.dtype), bias)
    u = factor(tensors, encoding, "lowrank_u", shape[0])
    v = factor(tensors, encoding, "lowrank_v", shape[1])
    if u is None or v is None:
        return y
    return y + F.linear(F.linear(x, v.to(x.dtype)), u.T.to(x.dtype))
