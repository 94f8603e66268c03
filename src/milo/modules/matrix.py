"""Modules that own the tensors of compressed matrices.

The parameters carry the names of the format (`weight_packed`, ..., `lowrank_v_scale`), so that a state dict and a
folder on disk are the same thing. They stay packed; a use dequantises what it needs and forgets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from milo.format.matrix import Encoding
from milo.kernels.reference import linear, reconstruct

_DTYPES = {"I32": torch.int32, "F16": torch.float16, "U8": torch.uint8}


class CompressedMatrix(nn.Module):
    """One compressed matrix `[N, K]`, or a stack of them in one set of tensors.

    Args:
        encoding: how it is written.
        shape: `(N, K)`.
        ranks: rank of each member; one member unless `stacked`.
        stacked: whether the tensors carry a leading member dimension.
        device: where (uninitialised) parameters are made.
    """

    def __init__(
        self,
        encoding: Encoding,
        shape: tuple[int, int],
        ranks: Sequence[int],
        stacked: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.encoding, self.shape, self.ranks, self.stacked = encoding, shape, tuple(ranks), stacked
        full = (len(self.ranks), *shape) if stacked else tuple(shape)
        for name, spec in encoding.tensors(full, sum(self.ranks)).items():
            empty = torch.empty(spec.shape, dtype=_DTYPES[spec.dtype], device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def fill(self, member: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy one solved matrix into its place."""
        views = self.member(member)
        for name, tensor in tensors.items():
            views[name].copy_(tensor)

    def member(self, member: int = 0) -> dict[str, torch.Tensor]:
        """The tensors of one matrix (views), by suffix."""
        tensors = {name: parameter.data for name, parameter in self.named_parameters(recurse=False)}
        tensors.pop("bias", None)
        if not self.stacked:
            return tensors
        first = sum(self.ranks[:member])
        last = first + self.ranks[member]
        return {n: t[first:last] if n.startswith("lowrank") else t[member] for n, t in tensors.items()}

    def reconstruct(self, member: int = 0) -> torch.Tensor:
        """`Ŵ`, float32 `[N, K]`."""
        return reconstruct(self.member(member), self.encoding, self.shape)

    def forward(self, x: torch.Tensor, member: int = 0) -> torch.Tensor:
        """`x · Ŵᵀ`: `[..., K]` to `[..., N]` in the dtype of `x`."""
        return linear(x, self.member(member), self.encoding, self.shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompressedMatrix:
        # `model.half()` and the like would round fp16 scales to bf16; only the device of packed tensors may change.
        kept = {id(p) for n, p in self.named_parameters(recurse=False) if n != "bias"}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) not in kept or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        n, k = self.shape
        e = self.encoding
        stack = f", stack of {len(self.ranks)}" if self.stacked else ""
        return f"in={k}, out={n}, bits={e.bits}, group={e.group_size}, rank={sum(self.ranks)} {e.factor}{stack}"


class CompressedLinear(CompressedMatrix):
    """Stands in for `nn.Linear`.

    Args:
        encoding: how the matrix is written.
        shape: `(N, K)`.
        rank: of the compensator.
        bias: whether there is one (kept in `dtype`).
        dtype: compute dtype, in which `weight` is handed out.
        device: where parameters are made.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        encoding: Encoding,
        shape: tuple[int, int],
        rank: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(encoding, shape, [rank], device=device)
        self.out_features, self.in_features = shape
        self.dtype = dtype
        empty = torch.empty(shape[0], dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if empty is not None else None)

    @classmethod
    def like(cls, linear: nn.Linear, encoding: Encoding, rank: int, device: torch.device | str) -> CompressedLinear:
        """An uninitialised replacement for `linear`, which keeps the same bias."""
        shape = (linear.out_features, linear.in_features)
        new = cls(encoding, shape, rank, linear.bias is not None, linear.weight.dtype, device)
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    @property
    def weight(self) -> torch.Tensor:
        """The reconstructed weight `[N, K]`, rebuilt at every access, for models that read it directly."""
        return self.reconstruct().to(self.dtype)

    def forward(self, x: torch.Tensor, member: int = 0) -> torch.Tensor:
        """`x · Ŵᵀ + bias`."""
        return linear(x, self.member(member), self.encoding, self.shape, self.bias)
