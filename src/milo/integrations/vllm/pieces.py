"""A matrix of the plan on its way into a layer: this rank's shard of it, gathered tensor by tensor.

vLLM's loaders hand tensors over one at a time, in any order, views of a mapped file among them. Each is checked
against the plan, cut, copied to the device and kept until the layer has all of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from vllm.model_executor.utils import set_weight_attrs

from milo.checkpoint.inventory import Kind
from milo.checkpoint.source import TORCH_DTYPES
from milo.errors import FormatError, ServingError
from milo.format.codes import BLOCK
from milo.format.shards import Span, cut_tensor, pad_columns, shard_encoding
from milo.integrations.vllm.dummy import dummy_matrix
from milo.kernels.layout import TILE, supports
from milo.plan.plan import Row

Tensors = dict[str, torch.Tensor]


class Part(Protocol):
    """What a layer waits for: a `Piece`, or a weight that is not compressed."""

    @property
    def missing(self) -> list[str]: ...
    def add(self, suffix: str, tensor: torch.Tensor) -> None: ...
    def fill(self) -> None: ...


class Waiting:
    """How many tensors a layer still waits for.

    Args:
        parts: of the layer, or of several matrices in it.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._all = self._left = sum(len(part.missing) for part in parts)

    @property
    def over(self) -> bool:
        """Whether everything has come."""
        return self._left == 0

    def add(self, part: Part, suffix: str, tensor: torch.Tensor) -> None:
        """A tensor came for one of the parts."""
        part.add(suffix, tensor)
        self._left -= 1

    def end(self, dummy: bool) -> None:
        """Loading is over but the waiting is not: make weights up, if that is what was asked for.

        Raises:
            FormatError: something did not come.
        """
        if not dummy or self._left != self._all:
            missing = [name for part in self._parts for name in part.missing]
            raise FormatError(f"{missing[0]} is missing from the checkpoint ({len(missing)} tensors of its layer are)")
        for part in self._parts:
            part.fill()


def share(name: str, side: str, total: int, size: int, rank: int, ranks: int) -> Span:
    """Which features a rank holds, from how many it holds.

    vLLM cuts a side into equal pieces; where there are fewer pieces than ranks (key and value heads), neighbours hold
    the same one.

    Args:
        name: of the matrix, for errors.
        side: `out-features` or `in-features`, for errors.
        total: features of the matrix.
        size: features a rank holds.
        rank: this rank.
        ranks: how many there are.

    Raises:
        ServingError: the pieces are not whole blocks of 32 features.
    """
    pieces = total // size
    if pieces * size != total or (ranks % pieces and pieces != 1):
        raise ServingError(f"{name} has {total} {side}; vLLM wants {size} of them on each of {ranks} GPUs")
    if size % BLOCK:
        fits = [n for n in (1, 2, 4, 8, 16, 32) if total % (n * BLOCK) == 0]
        instead = f"use --tensor-parallel-size {' or '.join(map(str, fits))}" if fits else "MiLo cannot serve it"
        raise ServingError(
            f"{name}: tensor parallelism over {ranks} GPUs leaves {size} of its {total} {side} to each, not a "
            f"multiple of {BLOCK}; {instead}"
        )
    begin = (rank * pieces // ranks) * size
    return Span(begin, begin + size, total)


def stored_dtypes(row: Row) -> dict[str, torch.dtype]:
    """Dtype of every kind of tensor that a row's matrices have, by suffix."""
    return {
        suffix: TORCH_DTYPES[spec.dtype] for suffix, spec in row.encoding.tensors(row.shape, max(row.ranks)).items()
    }


def empty(dtype: torch.dtype, loader: Callable[..., Any]) -> nn.Parameter:
    """A parameter without elements, for what vLLM wants of one: a name, a device, a loader."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": loader})
    return parameter


class Piece:
    """One rank's shard of one matrix.

    Args:
        row: of the plan.
        member: which of its matrices.
        rows: out-features this rank holds.
        columns: in-features.
        device: where the tensors are kept.

    Raises:
        ServingError: the kernels' layout has no place for a matrix that is written so.
    """

    def __init__(self, row: Row, member: int, rows: Span, columns: Span, device: torch.device) -> None:
        self.name = row.matrices()[member if row.kind is Kind.EXPERTS else 0]
        self.rows, self.columns = rows, columns
        self.encoding = shard_encoding(row.encoding, columns)
        # Codes of two planes come in whole tiles and groups of in-features.
        whole = max(TILE, self.encoding.group_size) if self.encoding.planes > 1 else 1
        self.tail = -columns.stored % whole
        self._row, self._device = row, device
        self.rank = row.ranks[member]
        self._specs = row.encoding.tensors(row.shape, self.rank)
        self._tensors: Tensors = {}
        fits, reason = supports(self.encoding, self.shape)
        if not fits:
            raise ServingError(f"vLLM cannot serve {self.name}: {reason}; compress the model again without them")

    @property
    def shape(self) -> tuple[int, int]:
        """Out- and in-features of the shard as it is stored, lead and tail included."""
        return self.rows.stored, self.columns.stored + self.tail

    @property
    def missing(self) -> list[str]:
        """Full names of the tensors that have not come."""
        return [f"{self.name}.{suffix}" for suffix in self._specs if suffix not in self._tensors]

    def add(self, suffix: str, tensor: torch.Tensor) -> None:
        """Keep this rank's part of a stored tensor.

        Raises:
            FormatError: the plan promises no such tensor, or it has come before.
        """
        if suffix in self._tensors:
            raise FormatError(f"{self.name}.{suffix} comes twice out of the checkpoint")
        spec = self._specs.get(suffix)
        if spec is None or tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            promised = f"{spec.dtype} {spec.shape}" if spec else "no such tensor"
            raise FormatError(
                f"{self.name}.{suffix} is {tensor.dtype} {tuple(tensor.shape)}, but the plan in config.json promises "
                f"{promised}: the folder is damaged or mixed from two"
            )
        cut = cut_tensor(suffix, tensor, self._row.encoding, self.rows, self.columns)
        # A copy even where nothing is cut: some loaders use their buffer again.
        self._tensors[suffix] = torch.empty_like(cut, device=self._device, memory_format=torch.contiguous_format)
        self._tensors[suffix].copy_(cut)

    def fill(self) -> None:
        """Weights that are not there (`--load-format dummy`): small random ones."""
        n, k = self.rows.stored, self.columns.stored
        self._tensors = dummy_matrix(self.encoding, (n, k), self.rank, self._device)

    def take(self) -> Tensors:
        """The shard's tensors, of `shape` and `encoding`, which are let go here."""
        tensors, self._tensors = self._tensors, {}
        return pad_columns(tensors, self.encoding, self.columns.stored, self.shape[1]) if self.tail else tensors
