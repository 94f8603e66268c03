"""Modules that own the tensors of compressed matrices.

The parameters carry the names of the format (`weight_packed`, ..., `lowrank_v_scale`), so that a state dict and a
folder on disk are the same thing. They stay packed; a use dequantises what it needs and forgets it, unless
`milo.modules.packed` has moved the matrix to the kernels' layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milo import ops
from milo.format.matrix import Encoding
from milo.kernels.reference import linear, reconstruct

if TYPE_CHECKING:
    from milo.modules.packed import PackedWeight

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
        self._source: Callable[[int], Mapping[str, torch.Tensor]] | None = None

    @property
    def released(self) -> bool:
        """Whether the tensors are held elsewhere (see `release`)."""
        return self._source is not None

    def release(self, source: Callable[[int], Mapping[str, torch.Tensor]]) -> None:
        """Give the tensors up; from now on `source` makes those of a member whenever they are asked for."""
        for name in [name for name in self._parameters if name != "bias"]:
            del self._parameters[name]
        self._source = source

    def fill(self, member: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy one solved matrix into its place."""
        views = self.member(member)
        for name, tensor in tensors.items():
            views[name].copy_(tensor)

    def member(self, member: int = 0) -> dict[str, torch.Tensor]:
        """The tensors of one matrix by suffix: views, or fresh ones where they were released."""
        if self._source is not None:
            return dict(self._source(member))
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
        stored = [tensor for name, tensor in self.named_parameters(recurse=False) if name != "bias"]
        return super()._apply(device_only(fn, stored), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._source is None:
            return
        # To the host, one at a time: a second copy of the model may not fit the device.
        members = [{n: t.cpu() for n, t in self._source(i).items()} for i in range(len(self.ranks))]
        for name in sorted({name for member in members for name in member}):
            parts = [member[name] for member in members if name in member]
            if self.stacked:
                parts = [torch.cat(parts) if name.startswith("lowrank") else torch.stack(parts)]
            destination[prefix + name] = parts[0]

    def extra_repr(self) -> str:
        n, k = self.shape
        e = self.encoding
        stack = f", stack of {len(self.ranks)}" if self.stacked else ""
        return f"in={k}, out={n}, bits={e.bits}, group={e.group_size}, rank={sum(self.ranks)} {e.factor}{stack}"


def device_only(
    fn: Callable[[torch.Tensor], torch.Tensor], stored: Iterable[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `nn.Module._apply` may do with packed tensors: `model.bfloat16()` and the like move them, but never round.

    Args:
        fn: what it does with the others.
        stored: the packed tensors.
    """
    kept = {id(tensor) for tensor in stored}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

    return move


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
    packed: PackedWeight | None

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
        self.packed = None

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
        if self.packed is not None:
            return ops.linear(x, self.packed.matrix, self.bias)
        return linear(x, self.member(member), self.encoding, self.shape, self.bias)
