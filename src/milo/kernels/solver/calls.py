"""What the solver calls in place of its PyTorch passes: the same results, one or two passes over the weights.

Codes may differ from the PyTorch path where a value lies within rounding error of the middle of two (about one in
10⁵); everything is deterministic. Tensors must lie on a device that Triton serves.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from milo.format.codes import word_count
from milo.format.matrix import FACTOR_GROUP, Encoding

WIDEST = 128  # columns that `whitener` serves

# Elements of a program's tile. `search` runs one warp a program: the sums of its 20 steps then need no barrier.
_TILE = 2048
_SEARCH_TILE = 512


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernels serve this tensor: it is on a CUDA device and Triton is installed."""
    return tensor.is_cuda and _installed()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)


@dataclass(frozen=True)
class _Layout:
    """How a kernel walks over `[E, N, K]` in groups."""

    groups: int
    n_groups: int
    block: int
    launch: tuple[int, int]
    sizes: tuple[int, int, int, int]  # n_groups, groups, K, N·K
    flags: dict[str, Any]


def _layout(shape: torch.Size, size: int, tile: int) -> _Layout:
    stack, rows, columns = shape
    groups = -(-columns // size)
    block = tile // size
    return _Layout(
        groups,
        rows * groups,
        block,
        (-(-rows * groups // block), stack),
        (rows * groups, groups, columns, rows * columns),
        # Fused multiply-adds are asked for, because Triton's default is about to change.
        {"SIZE": size, "BLOCK": block, "RAGGED": columns % size != 0, "enable_fp_fusion": True},
    )


def minmax(target: torch.Tensor, encoding: Encoding, max_zero: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The min-max grid of `target`, for fp16 scales.

    Args:
        target: float32 `[E, N, K]`, contiguous.
        encoding: `scale_bits` must be 16.
        max_zero: bound of a group's magnitude over its scale.

    Returns:
        Scales and zeros, float32 `[E, N, G]`, rounded to their stored form.
    """
    scale, zero, _, _ = _search(target, None, encoding, max_zero, 0, 1.0, 1.0, 1.0)
    return scale, zero


def half_quadratic(
    target: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    encoding: Encoding,
    *,
    max_zero: float,
    steps: int,
    beta: float,
    kappa: float,
    p_norm: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-quadratic zeros for every group of `target`, each matrix stopped by its own mean error.

    Args:
        target: float32 `[E, N, K]`, contiguous.
        start: scales and zeros to start from, or None for the min-max grid (`scale_bits` 16).
        encoding: widths and group size.
        max_zero: as for `minmax`.
        steps: steps at most.
        beta: β₀.
        kappa: growth of β a step.
        p_norm: p.

    Returns:
        Scales, and zeros that are not rounded yet, float32 `[E, N, G]`.
    """
    scale, _, zeros, errors = _search(target, start, encoding, max_zero, steps, beta, kappa, p_norm)
    totals = errors.sum(-1, dtype=torch.float64)
    # The first step whose error no longer falls is still taken, none after it.
    falls = (totals[:, 1:] < totals[:, :-1]).cumprod(1).sum(1)
    last = (falls + 1).clamp(max=steps - 1)
    return scale, zeros[torch.arange(len(target), device=target.device), last]


def _search(
    target: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    encoding: Encoding,
    max_zero: float,
    steps: int,
    beta: float,
    kappa: float,
    p_norm: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from milo.kernels.solver import groups

    target = target.contiguous()
    stack, rows, _ = target.shape
    layout = _layout(target.shape, encoding.group_size, _SEARCH_TILE)
    if start is None:
        scale, zero = (target.new_empty(stack, rows, layout.groups) for _ in range(2))
    else:
        scale, zero = (t.contiguous() for t in start)
    zeros = target.new_empty(stack, steps, rows, layout.groups)
    errors = target.new_empty(stack, steps, layout.launch[0])
    with torch.cuda.device_of(target):
        groups.search[layout.launch](
            target,
            scale,
            zero,
            zeros,
            errors,
            *layout.sizes,
            encoding.zero_step if encoding.zero_bits < 16 else 1.0,
            **layout.flags,
            MAX_CODE=encoding.max_code,
            ZERO_TOP=2**encoding.zero_bits - 1 if encoding.zero_bits < 16 else 0,
            START=start is None,
            STEPS=steps,
            BETA=beta,
            KAPPA=kappa,
            SHRINK=kappa ** (-1 / (2 - p_norm)),
            P_NORM=p_norm,
            MAX_ZERO=max_zero,
            num_warps=1,
        )
    return scale, zero, zeros, errors


def quantise(
    weight: torch.Tensor,
    target: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    encoding: Encoding,
    residual: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Nearest codes of `target` and what they leave of `weight`.

    Args:
        weight: float32 `[E, N, K]`.
        target: likewise; may be `weight` itself.
        scale: float32 `[E, N, G]`.
        zero: float32 `[E, N, G]`.
        encoding: widths and group size.
        residual: dtype of the residual, None to do without it.

    Returns:
        Codes uint8 `[E, N, K]`, the residual or None, and its Frobenius norms, float64 `[E]`, taken before it is
        rounded to its dtype.
    """
    from milo.kernels.solver import groups

    same = weight is target
    weight = weight.contiguous()
    target = weight if same else target.contiguous()
    layout = _layout(target.shape, encoding.group_size, _TILE)
    codes = torch.empty_like(target, dtype=torch.uint8)
    left = None if residual is None else torch.empty_like(target, dtype=residual)
    squares = target.new_empty(target.shape[0], layout.launch[0])
    with torch.cuda.device_of(target):
        groups.quantise[layout.launch](
            target,
            weight,
            scale.contiguous(),
            zero.contiguous(),
            codes,
            target if left is None else left,
            squares,
            *layout.sizes,
            **layout.flags,
            MAX_CODE=encoding.max_code,
            KEEP=left is not None,
            SAME=same,
            num_warps=4,
        )
    return codes, left, squares.sum(-1, dtype=torch.float64).sqrt()


def retarget(
    weight: torch.Tensor, product: torch.Tensor, scale: torch.Tensor, group_size: int, amplitude: float, seed: int
) -> torch.Tensor:
    """`weight − product`, plus uniform noise of `amplitude` steps of each group's scale.

    Args:
        weight: float32 `[E, N, K]`.
        product: float32 or bfloat16 `[E, N, K]`.
        scale: float32 `[E, N, G]`.
        group_size: in-features a group.
        amplitude: width of the noise in steps; 0 for none.
        seed: of the noise, which is the same for every member.

    Returns:
        float32 `[E, N, K]`.
    """
    from milo.kernels.solver import groups

    weight, product = weight.contiguous(), product.contiguous()
    layout = _layout(weight.shape, group_size, _TILE)
    target = torch.empty_like(weight)
    with torch.cuda.device_of(weight):
        groups.retarget[layout.launch](
            weight,
            product,
            scale.contiguous(),
            target,
            *layout.sizes,
            amplitude,
            seed,
            **layout.flags,
            NOISE=amplitude > 0,
            num_warps=4,
        )
    return target


def round_rows(rows: torch.Tensor, bits: int, fractions: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and signed scales of least squared error for factor rows.

    Args:
        rows: float32 `[..., L]`.
        bits: 3 or 8.
        fractions: of the range, at which the largest magnitude is tried.

    Returns:
        Codes, uint8 `[..., L]`, and fp16 scales `[..., ceil(L/64)]`.
    """
    from milo.kernels.solver import groups

    rows = rows.contiguous()
    length = rows.shape[-1]
    layout = _layout(torch.Size((1, rows.numel() // length, length)), FACTOR_GROUP, _SEARCH_TILE)
    codes = torch.empty_like(rows, dtype=torch.uint8)
    scales = torch.empty(*rows.shape[:-1], layout.groups, dtype=torch.float16, device=rows.device)
    with torch.cuda.device_of(rows):
        groups.round_rows[layout.launch[:1]](
            rows,
            _constant(fractions, rows.device),
            codes,
            scales,
            *layout.sizes[:3],
            **layout.flags,
            LOW=-(2 ** (bits - 1)),
            HIGH=2 ** (bits - 1) - 1,
            CANDIDATES=len(fractions),
            num_warps=1,
        )
    return codes, scales


def whitener(gram: torch.Tensor, shift: float, unit: bool) -> torch.Tensor:
    """`T` such that the columns of `C·T` are orthonormal, but for the shift, where `gram` is `CᵀC`.

    Args:
        gram: float32 `[E, r, r]`, `r` at most `WIDEST`.
        shift: added to the diagonal, so that the Cholesky factorisation cannot break down.
        unit: scale the columns of `C` to length 1 first; columns of zeros stay zeros.

    Returns:
        float32 `[E, r, r]`: `D·L⁻ᵀ` with `L·Lᵀ = D·CᵀC·D + shift`.
    """
    from milo.kernels.solver import gram as kernels

    gram = gram.contiguous()
    width = gram.shape[-1]
    inverse = torch.empty_like(gram)
    size = 64 if width <= 64 else 128
    with torch.cuda.device_of(gram):
        kernels.whiten[(len(gram),)](gram, inverse, width, shift, SIZE=size, UNIT=unit, num_warps=size // 8)
    return inverse.mT


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`milo.format.codes.pack_words` for uint8 codes of at most 4 bits."""
    from milo.kernels.solver import groups

    codes = codes.contiguous()
    length = codes.shape[-1]
    words = word_count(length, bits)
    stream = torch.empty(*codes.shape[:-1], 4 * words, dtype=torch.uint8, device=codes.device)
    octets, block = stream.numel() // bits, 512
    with torch.cuda.device_of(codes):
        groups.pack[(-(-octets // block),)](
            codes, stream, octets, 4 * words // bits, length, BITS=bits, BLOCK=block, num_warps=4
        )
    return stream.view(torch.int32)
