"""Rounding the compensator's factors to INT3 or INT8.

A factor row (`Uᵀ [r, N]` or `V [r, K]`: one singular direction) is cut into groups of 64 along its long axis, and
each group stores one *signed* fp16 scale: value = scale · (code − 2^{b−1}). Eight levels reach from −4 to +3, so
the sign puts the longer arm on the side that needs it. The paper's rule takes the signed maximum of the group as
the scale (its code's defect: a group whose largest magnitude is negative is clipped); ours searches the scale of
least squared error and refits it to the chosen codes.

Rounding U leaves an error that V can still take up: V is refitted to the rounded U before it is rounded itself.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from milo.format.matrix import FACTOR_BITS, FACTOR_GROUP
from milo.kernels.solver import calls
from milo.solve.grid import pack

# Fractions of the range at which the largest magnitude is placed; below 1 the largest values are clipped.
CANDIDATES = {3: (0.55, 0.62, 0.69, 0.76, 0.83, 0.9, 0.97, 1.04, 1.12), 8: (0.98, 1.0)}
_RIDGE = 1e-6


def round_rows(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of least squared error for factor rows.

    Args:
        rows: float32 `[..., L]`.
        bits: 3 or 8.

    Returns:
        Codes, uint8 `[..., L]`, and signed fp16 scales `[..., ceil(L/64)]`.
    """
    if calls.usable(rows):
        return calls.round_rows(rows, bits, CANDIDATES[bits])
    length = rows.shape[-1]
    groups = F.pad(rows, (0, -length % FACTOR_GROUP)).unflatten(-1, (-1, FACTOR_GROUP))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    top = groups.abs().amax(-1)
    best_scale = torch.zeros_like(top)
    best_error = groups.square().sum(-1)  # of the all-zero group
    for fraction in CANDIDATES[bits]:
        for sign in (1.0, -1.0):
            scale = top * (sign * fraction / -low)
            for _ in range(2):  # the second time with the scale refitted to the codes
                stored = scale.half().float()
                codes = _nearest(groups, stored, low, high)
                error = (groups - codes * stored[..., None]).square_().sum(-1)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_scale = torch.where(better, stored, best_scale)
                scale = (groups * codes).sum(-1) / codes.square().sum(-1).clamp(min=1)
    codes = _nearest(groups, best_scale, low, high).sub_(low)
    return codes.to(torch.uint8).flatten(-2)[..., :length], best_scale.half()


def value_of(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `round_rows`, float32 `[..., L]`."""
    spread = scales.float().repeat_interleave(FACTOR_GROUP, dim=-1)[..., : codes.shape[-1]]
    return (codes.float() - 2 ** (bits - 1)) * spread


def round_factors(
    residual: torch.Tensor, u: torch.Tensor, v: torch.Tensor, kind: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Write compensators in their stored form, V refitted to the rounded U.

    Args:
        residual: float32 `[..., N, K]`, what `u @ v` approximates.
        u: float32 `[..., N, r]`; columns of zeros stay zeros.
        v: float32 `[..., r, K]`.
        kind: `int3`, `int8` or `fp16`.

    Returns:
        The tensors `lowrank_u`, `lowrank_v` (and their scales), and the product of the stored factors, float32
        `[..., N, K]`.
    """
    bits = FACTOR_BITS[kind]
    tensors: dict[str, torch.Tensor] = {}
    stored_u = _store(u.mT, bits, "lowrank_u", tensors)
    if bits < 16:
        v = _refit(residual, stored_u, v)
    stored_v = _store(v, bits, "lowrank_v", tensors)
    return tensors, stored_u.mT @ stored_v


def _store(rows: torch.Tensor, bits: int, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if bits == 16:
        tensors[name] = rows.half().contiguous()
        return tensors[name].float()
    codes, scales = round_rows(rows.contiguous(), bits)
    tensors[name] = pack(codes, bits)
    tensors[name + "_scale"] = scales
    return value_of(codes, scales, bits)


def _refit(residual: torch.Tensor, stored_u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Least squares for V given rounded Uᵀ `[..., r, N]`; the old V where the normal equations are singular."""
    gram = stored_u @ stored_u.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + 1e-30)
    root, info = torch.linalg.cholesky_ex(gram)
    return torch.where((info == 0)[..., None, None], torch.cholesky_solve(stored_u @ residual, root), v)


def _nearest(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (groups * inverse[..., None]).round_().clamp_(low, high)
