"""Wide codes and narrow metadata, as the kernels see them: 3- and 4-bit planes with an fp16 scale and zero each.

A code of 6 or 8 bits is two planes of `b = 3` or 4 bits that share a scale, and splits into two products,

    s·(2^b·hi + lo − z)  =  2^b·s·(hi − z_hi)  +  s·(lo − z_lo),        z = 2^b·z_hi + z_lo,

so a wide matrix is a plain one with twice the columns, `[lo | hi]`, that is multiplied by `[x | x]`: no second kernel.
`z_hi` is the nearest integer to `z / 2^b`, so that neither product is larger than the weights themselves.

Scales and zeros of 6 and 8 bits are spread to fp16, which tells any two of them apart: `gather` finds the stored
codes again without loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from milo.format.codes import pack_bytes, pack_words, unpack_words
from milo.format.matrix import Encoding
from milo.kernels import reference

_CODES = ("weight_packed", "weight_packed_hi")  # lowest plane first


def spread(
    tensors: Mapping[str, torch.Tensor], encoding: Encoding, k: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Planes side by side.

    Args:
        tensors: of one matrix, as stored.
        encoding: how they are written.
        k: in-features; with two planes a multiple of `tile` and of the group size.
        tile: what the columns of a plane are padded to.

    Returns:
        Codes uint8 `[N, planes · K padded]`, scales and zeros float16 `[N, planes · groups]`.
    """
    planes = [unpack_words(tensors[name], encoding.plane_bits, k) for name in _CODES[: encoding.planes]]
    codes = torch.cat([F.pad(plane, (0, -k % tile)) for plane in planes], -1)
    groups = encoding.groups(k)
    scale, zero = reference.scales(tensors, encoding, groups), reference.zeros(tensors, encoding, groups)
    if encoding.planes == 2:
        base = 2**encoding.plane_bits
        high = (zero / base).round()
        scale = torch.cat([scale, scale * base], -1)
        zero = torch.cat([zero - high * base, high], -1)
    return codes, scale.half(), zero.half()


def gather(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, encoding: Encoding, k: int
) -> dict[str, torch.Tensor]:
    """Inverse of `spread`: the stored tensors, bit for bit.

    Args:
        codes: uint8 `[N, planes · K padded]`.
        scale: float16 `[N, planes · groups]`.
        zero: likewise.
        encoding: how the tensors are to be written.
        k: in-features.
    """
    groups = encoding.groups(k)
    planes = codes.chunk(encoding.planes, -1)
    tensors = {name: pack_words(plane[:, :k], encoding.plane_bits) for name, plane in zip(_CODES, planes, strict=False)}
    low = zero[:, :groups].float()
    whole = low if encoding.planes == 1 else low + zero[:, groups:].float() * 2**encoding.plane_bits
    scale = scale[:, :groups]
    if encoding.scale_bits == 16:
        tensors["weight_scale"] = scale.contiguous()
    else:  # the largest scale of a row is its super-scale (docs/format.md)
        top = scale.amax(-1, keepdim=True)
        steps = (scale.float() / top.float() / encoding.scale_step).round().to(torch.uint8)
        tensors["weight_scale"] = pack_bytes(steps, encoding.scale_bits)
        tensors["weight_super_scale"] = top[:, 0].contiguous()
    if encoding.zero_bits == 16:
        tensors["weight_zero"] = whole.half()
    else:
        steps = (whole / encoding.zero_step).round().to(torch.uint8)
        tensors["weight_zero"] = pack_bytes(steps, encoding.zero_bits)
    return tensors


def lossless(tensors: Mapping[str, torch.Tensor], encoding: Encoding, k: int, tile: int) -> bool:
    """Whether `gather` undoes `spread`: not for narrow scales of a row so small that fp16 blurs their steps."""
    if encoding.scale_bits == 16:
        return True
    small = tensors["weight_super_scale"].float() < 2.0**-16
    if not small.any():
        return True
    rows = {name: tensor[small] for name, tensor in tensors.items() if name.startswith("weight")}
    back = gather(*spread(rows, encoding, k, tile), encoding, k)
    return all(torch.equal(back[name], tensor) for name, tensor in rows.items())
