"""Grids: for every group of weights a scale and a zero, exactly as they will be stored.

A grid is the set of values a group can take, `scale · (code − zero)`. Here scales and zeros are rounded to their
stored form (fp16, or 6/8-bit fractions) *before* the codes are chosen, so that codes and compensators are fitted to
the numbers a loader will see and not to their float32 ancestors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from milo.format.codes import pack_bytes, pack_words
from milo.format.matrix import Encoding
from milo.kernels.solver import calls

# A group whose range is tiny beside its magnitude would need a huge zero, which fp16 cannot hold to half a code.
MAX_ZERO = 512.0
_FP16_TINY = 2.0**-24


@dataclass
class Grid:
    """Scales and zeros of a stack, all float32 `[E, N, G]`, already rounded to what `encoding` can store."""

    scale: torch.Tensor
    zero: torch.Tensor


def to_groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    """View `[E, N, K]` as groups `[E, N, G, size]`; a short last group is filled by repeating its last column.

    Repeating a value leaves the group's minimum and maximum alone; whoever averages over a group must skip it
    (`group_counts`).
    """
    tail = -weight.shape[-1] % size
    if tail:
        weight = torch.cat([weight, weight[..., -1:].expand(*weight.shape[:-1], tail)], dim=-1)
    return weight.unflatten(-1, (-1, size))


def group_counts(in_features: int, size: int, device: torch.device) -> torch.Tensor:
    """Real members of each group, float32 `[G]`."""
    groups = -(-in_features // size)
    counts = torch.full((groups,), float(size), device=device)
    counts[-1] = in_features - (groups - 1) * size
    return counts


def minmax_grid(weight: torch.Tensor, encoding: Encoding) -> Grid:
    """Round-to-nearest grid: the codes 0 and `2**bits − 1` fall on the group's minimum and maximum (HQQ's start).

    Args:
        weight: float32 `[E, N, K]`.
        encoding: widths and group size.

    Returns:
        The grid; the zero is real-valued. All-equal groups are represented exactly up to the rounding of the scale.
    """
    if calls.usable(weight) and encoding.scale_bits == 16:
        return Grid(*calls.minmax(weight, encoding, MAX_ZERO))
    groups = to_groups(weight, encoding.group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    if encoding.zero_bits < 16:  # such a zero lies inside the code range, so the grid must reach 0
        low, high = low.clamp(max=0), high.clamp(min=0)
    magnitude = torch.maximum(low.abs(), high.abs())
    span = high - low
    scale = torch.maximum(span / encoding.max_code, magnitude / MAX_ZERO)
    # A group of zeros is exact on any scale; under a super-scale it must not become the row's largest.
    nothing = 1.0 if encoding.scale_bits == 16 else _FP16_TINY
    scale = torch.where(span == 0, torch.where(magnitude == 0, nothing, magnitude), scale)
    scale = round_scale(scale, encoding)
    return Grid(scale, round_zero(-low / scale, encoding))


def round_scale(scale: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Positive scales `[E, N, G]` rounded to what `encoding` stores, float32."""
    if encoding.scale_bits == 16:
        return _half(scale)
    code, top = _scale_codes(scale, encoding)
    return code * encoding.scale_step * top


def round_zero(zero: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Zeros `[E, N, G]` rounded to what `encoding` stores, float32."""
    if encoding.zero_bits == 16:
        return zero.clamp(-65504, 65504).half().float()
    return _zero_codes(zero, encoding) * encoding.zero_step


def encode(weight: torch.Tensor, grid: Grid, encoding: Encoding) -> torch.Tensor:
    """Nearest codes, uint8 `[E, N, K]` (Eq. 9 of the paper)."""
    groups = to_groups(weight, encoding.group_size)
    codes = groups / grid.scale[..., None]
    codes.add_(grid.zero[..., None]).round_().clamp_(0, encoding.max_code)
    return codes.to(torch.uint8).flatten(-2)[..., : weight.shape[-1]]


def decode(codes: torch.Tensor, grid: Grid, encoding: Encoding) -> torch.Tensor:
    """`scale · (code − zero)`, float32 `[E, N, K]` (Eq. 3)."""
    groups = to_groups(codes, encoding.group_size).float()
    weight = groups.sub_(grid.zero[..., None]).mul_(grid.scale[..., None])
    return weight.flatten(-2)[..., : codes.shape[-1]]


def quantise(
    weight: torch.Tensor, target: torch.Tensor, grid: Grid, encoding: Encoding
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nearest codes of `target` and what they leave of `weight`, in one pass on a GPU.

    Args:
        weight: float32 `[E, N, K]`.
        target: likewise; may be `weight` itself.
        grid: scales and zeros.
        encoding: widths and group size.

    Returns:
        Codes uint8 `[E, N, K]`; the residual, float32 on a CPU and bfloat16 on a GPU; its Frobenius norm before that
        rounding, float64 `[E]`.
    """
    if calls.usable(target):
        codes, residual, norm = calls.quantise(weight, target, grid.scale, grid.zero, encoding, torch.bfloat16)
        assert residual is not None
        return codes, residual, norm
    codes = encode(target, grid, encoding)
    residual = weight - decode(codes, grid, encoding)
    return codes, residual, torch.linalg.vector_norm(residual, dim=(1, 2)).double()


def nearest(target: torch.Tensor, grid: Grid, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes of `target` and the Frobenius norm of their error: `quantise` where nobody needs the residual."""
    if calls.usable(target):
        codes, _, norm = calls.quantise(target, target, grid.scale, grid.zero, encoding, None)
        return codes, norm
    codes, _, norm = quantise(target, target, grid, encoding)
    return codes, norm


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack_words`, in one pass on a GPU."""
    return calls.pack_words(codes, bits) if calls.usable(codes) and bits <= 4 else pack_words(codes, bits)


def grid_tensors(grid: Grid, encoding: Encoding) -> dict[str, torch.Tensor]:
    """The grid's tensors on disk, for the whole stack: `weight_scale`, `weight_zero`, maybe `weight_super_scale`."""
    tensors = {}
    if encoding.scale_bits == 16:
        tensors["weight_scale"] = grid.scale.half()
    else:
        code, top = _scale_codes(grid.scale, encoding)
        tensors["weight_scale"] = pack_bytes(code.to(torch.uint8), encoding.scale_bits)
        tensors["weight_super_scale"] = top[..., 0].half()
    if encoding.zero_bits == 16:
        tensors["weight_zero"] = grid.zero.half()
    else:
        zero_codes = _zero_codes(grid.zero, encoding)
        tensors["weight_zero"] = pack_bytes(zero_codes.to(torch.uint8), encoding.zero_bits)
    return tensors


def _scale_codes(scale: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    # The row's largest scale is its own code's maximum, so rounding a second time changes nothing.
    top = _half(scale.amax(-1, keepdim=True))
    code = (scale / top / encoding.scale_step).round().clamp(1, 2**encoding.scale_bits - 1)
    return code, top


def _zero_codes(zero: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    return (zero / encoding.zero_step).round().clamp(0, 2**encoding.zero_bits - 1)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().float().clamp(min=_FP16_TINY)
