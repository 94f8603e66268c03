"""The best rank-r factors of a stack of residuals (Eq. 10-12), without an SVD.

Block subspace iteration: a basis `B [K, r]` is pushed through `R` and orthonormalised, `Q = orth(R·B)`; then
`P = QᵀR` are the best right factors for that `Q`, and `R ≈ Q·P` leaves `‖R‖² − ‖P‖²`. The rows of `P`, each of unit
length, are the next basis. In MiLo's alternation the residual changes little from one round to the next, so one such
pass a round is enough; a cold start takes a few.

What is *not* here, and why (measured, see docs/log.md):

* **No eigenproblem.** Only the product `Q·P` enters the alternation, and it does not change under a rotation of the
  inner index. Neither does the error that rounding the factors adds, to first order: it is the sum of `‖uᵢ‖²‖vᵢ‖²`,
  which is `‖P‖²` in every orthonormal basis. So the singular directions themselves are never needed.
* **No oversampling.** Without the eigenproblem, further columns would not help the first `r`. With both, the error
  after 20 rounds is the same within 0.3 % (within 0.8 % at half of the full rank).
* **No QR.** Householder QR of a stack is a loop over its members on a GPU, with host syncs. `_orthonormal` is a
  Cholesky factorisation of the Gram matrix (two in a cold start, whose columns are worse conditioned) and a
  Newton-Schulz step: products, mostly. On a GPU a kernel factorises and inverts up to 128 columns in one launch.

A member whose rank is below the stack's width has zero columns, which every step keeps at zero.

Cost of a pass for `[N, K]` at rank r: two products with `R` (4·N·K·r FLOP) that read it twice, and about 8·N·r² FLOP
in float32. `R` may be bfloat16: products then run on tensor cores with bfloat16 results, and everything of size r is
float32. That perturbs the subspace by 2⁻⁹ and the explained energy by 2⁻¹⁸, and moves no final error (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from milo.kernels.solver import calls

COLD_PASSES = 6
# Relative to a unit diagonal. Above the rounding error of a float32 Gram matrix of up to 1024 columns whatever their
# condition (measured: 3e-5 can fail), so that the factorisation never breaks down and nobody has to look at `info`.
_SHIFT = 1e-4
_SEED = 0


@dataclass
class LowRank:
    """`R ≈ left · right` for a stack.

    Attributes:
        left: float32 `[E, N, r]`, orthonormal columns; the zero columns of members of lower rank come last.
        right: float32 `[E, r, K]`, `leftᵀ · R`.
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def basis(self) -> torch.Tensor:
        """The start of the next fit, `[E, K, r]`: the rows of `right` at unit length."""
        length = torch.linalg.vector_norm(self.right, dim=-1, keepdim=True)
        return (self.right * _inverse(length)).mT

    @property
    def energy(self) -> torch.Tensor:
        """What the product explains of `‖R‖²`, float64 `[E]`."""
        return self.right.square().sum((1, 2), dtype=torch.float64)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`U [E, N, r]` and `V [E, r, K]` with equal lengths of `uᵢ` and `vᵢ`, as the split of Eq. 12 has them."""
        root = torch.linalg.vector_norm(self.right, dim=-1).sqrt()
        return self.left * root[:, None], self.right * _inverse(root)[..., None]


def fit_lowrank(residual: torch.Tensor, ranks: torch.Tensor, width: int, basis: torch.Tensor | None = None) -> LowRank:
    """Factors of every matrix of `residual`.

    Args:
        residual: float32 or bfloat16 `[E, N, K]`.
        ranks: integer `[E]`, on the same device, each 1 to `width`.
        width: the largest of `ranks` (given apart, so that nobody has to wait for the device).
        basis: `LowRank.basis` of an earlier fit of a similar residual, or None for a cold start.

    Returns:
        The factors. Deterministic: the cold start draws from a generator of its own with a fixed seed.

    Raises:
        ValueError: for a width out of range.
    """
    out_features, in_features = residual.shape[1:]
    if not 1 <= width <= min(out_features, in_features):
        raise ValueError(f"rank {width} is out of range for matrices of {out_features} x {in_features}")
    passes = steps = 1
    if basis is None:
        passes, steps = COLD_PASSES, 2
        device = residual.device
        generator = torch.Generator(device).manual_seed(_SEED)
        # One draw serves the whole stack, row by row so that a member's start does not depend on the others' ranks.
        start = torch.randn(width, in_features, generator=generator, device=device)
        basis = (start * (torch.arange(width, device=device) < ranks[:, None])[..., None]).mT
    for _ in range(passes):
        left = _orthonormal(_product(residual, basis), steps)
        fit = LowRank(left, _product(left.mT, residual))
        basis = fit.basis
    return fit


def whole(residual: torch.Tensor) -> LowRank:
    """The trivial factors of full rank: the identity and the residual itself (transposed if that is narrower).

    Rounded to a few bits they are better than any others, since the identity is on every grid.
    """
    stack, out_features, in_features = residual.shape
    residual = residual.float()
    if out_features <= in_features:
        return LowRank(torch.eye(out_features, device=residual.device).expand(stack, -1, -1), residual)
    return LowRank(residual, torch.eye(in_features, device=residual.device).expand(stack, -1, -1))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in the narrower of both dtypes, float32."""
    dtype = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else torch.float32
    return (a.to(dtype) @ b.to(dtype)).float()


def _orthonormal(columns: torch.Tensor, steps: int) -> torch.Tensor:
    """Columns `[E, N, r]` that span the same space, orthonormal to about 1e-5.

    One shifted Cholesky step bears condition numbers up to about 1e2, two 1e4. Directions beyond come out shorter
    than 1, down to 0 for those within rounding error of the others: never longer, so that a projector made of them
    explains less than it might, but never invents energy. (In a residual whose directions differ by more than that,
    the few large ones are nearly all of the error.)
    """
    # One wide matrix is what the libraries are good at; their batched factorisations are slow, the more so if wide.
    if calls.usable(columns) and (columns.shape[-1] <= calls.WIDEST or len(columns) > 1):
        for step in range(steps):
            columns = columns @ _whitener(columns.mT @ columns, unit=step == 0)
        return torch.baddbmm(columns, columns, columns.mT @ columns, beta=1.5, alpha=-0.5)
    unit = torch.eye(columns.shape[-1], device=columns.device)
    columns = columns * _inverse(torch.linalg.vector_norm(columns, dim=1, keepdim=True))
    for _ in range(steps):
        gram = columns.mT @ columns
        gram.diagonal(dim1=-2, dim2=-1).add_(_SHIFT)
        root, _ = torch.linalg.cholesky_ex(gram)
        columns = columns @ torch.linalg.solve_triangular(root, unit.expand_as(gram), upper=False).mT
    # Newton-Schulz: singular values σ become σ(3 − σ²)/2, so what the shift took from them comes back.
    return columns @ (1.5 * unit - 0.5 * (columns.mT @ columns))


def _whitener(gram: torch.Tensor, unit: bool) -> torch.Tensor:
    """`calls.whitener` for any width: the kernel's elimination once more, a block of columns a step."""
    width, step = gram.shape[-1], calls.WIDEST
    if width <= step:
        return calls.whitener(gram, _SHIFT, unit)
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = _inverse(length) if unit else torch.ones_like(length)
    tile = gram * scale[:, None] * scale[..., None]
    tile.diagonal(dim1=-2, dim2=-1).add_(_SHIFT)
    for first in range(0, width, step):
        block, rest = slice(first, first + step), slice(first + step, width)
        inverse = calls.whitener(tile[:, block, block], 0.0, unit=False).mT
        line = inverse @ tile[:, block]
        line[..., block] = inverse
        tile[:, block] = line
        tile[:, rest, block] = 0
        tile[:, rest] -= line[..., rest].mT @ line
    return (tile.tril() * scale[:, None]).mT


def _inverse(length: torch.Tensor) -> torch.Tensor:
    return torch.where(length > 0, 1 / length, 0.0)
