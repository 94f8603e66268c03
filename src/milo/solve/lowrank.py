"""The best rank-r factors of a stack of residuals (Eq. 10-12), without a full SVD.

Block subspace iteration: a basis `V [K, q]` is pushed through `R` and `Rᵀ` with an orthogonalisation after each
product, then the small matrix `QᵀR [q, K]` gives singular values and vectors. In MiLo's alternation the residual
changes little from one round to the next, so the last round's basis is an excellent start and one pass is enough;
a cold start takes a few more. `q` exceeds the wanted rank by a fixed oversampling, because the residual of a 3-bit
grid is nearly white: its spectrum has no gap to hide behind.

For a rank near the full one the exact eigendecomposition of the smaller Gram matrix is cheaper than iterating.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OVERSAMPLE = 8
COLD_PASSES = 6
WARM_PASSES = 1
_SEED = 0


@dataclass
class LowRank:
    """Factors of a stack: `R ≈ U·V` with the singular values split evenly (Eq. 12).

    Attributes:
        u: float32 `[E, N, r]`.
        v: float32 `[E, r, K]`.
        basis: float32 `[E, K, q]`, the start of the next fit; None after an exact one.
        energy: float32 `[E, r]`, squared singular values that the factors carry, largest first.
    """

    u: torch.Tensor
    v: torch.Tensor
    basis: torch.Tensor | None
    energy: torch.Tensor


def fit_lowrank(residual: torch.Tensor, rank: int, basis: torch.Tensor | None = None) -> LowRank:
    """Rank-`rank` factors of every matrix of `residual`.

    Args:
        residual: float32 `[E, N, K]`.
        rank: 1 to `min(N, K)`.
        basis: `LowRank.basis` of an earlier fit of a similar residual, or None for a cold start.

    Returns:
        The factors. Deterministic: the cold start draws from a generator of its own with a fixed seed.

    Raises:
        ValueError: for a rank out of range.
    """
    stack, out_features, in_features = residual.shape
    smaller = min(out_features, in_features)
    if not 1 <= rank <= smaller:
        raise ValueError(f"rank {rank} is out of range for matrices of {out_features} x {in_features}")
    width = rank + OVERSAMPLE
    if 2 * width >= smaller:
        return _exact(residual, rank)

    passes = WARM_PASSES
    if basis is None:
        passes = COLD_PASSES
        generator = torch.Generator().manual_seed(_SEED)
        # Drawn on the CPU, so that every device starts from the same numbers; one draw serves the whole stack.
        basis = torch.randn(in_features, width, generator=generator).to(residual.device)
        basis = basis.expand(stack, in_features, width)
    left = _orthonormal(residual @ basis)
    for _ in range(passes - 1):
        left = _orthonormal(residual @ _orthonormal(residual.mT @ left))
    projected = left.mT @ residual
    energy, rotation = _eigh(projected @ projected.mT)
    right = rotation.mT @ projected
    return _split(left @ rotation, right, energy, rank, keep_basis=True)


def _exact(residual: torch.Tensor, rank: int) -> LowRank:
    if residual.shape[-2] <= residual.shape[-1]:
        energy, left = _eigh(residual @ residual.mT)
        return _split(left, left.mT @ residual, energy, rank, keep_basis=False)
    flipped = _exact(residual.mT, rank)
    return LowRank(flipped.v.mT, flipped.u.mT, None, flipped.energy)


def _split(left: torch.Tensor, right: torch.Tensor, energy: torch.Tensor, rank: int, keep_basis: bool) -> LowRank:
    """From `R ≈ left·right` with orthonormal `left [E, N, q]` and `right = diag(σ)·Vᵀ [E, q, K]`."""
    sigma = energy.sqrt()
    normal = right / sigma.clamp(min=1e-30)[..., None]
    root = sigma[:, :rank].sqrt()
    u = left[..., :rank] * root[:, None]
    v = normal[:, :rank] * root[..., None]
    return LowRank(u, v, normal.mT.contiguous() if keep_basis else None, energy[:, :rank])


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(columns).Q


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenpairs of symmetric matrices, largest first; eigenvalues below zero by rounding are zero."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)
