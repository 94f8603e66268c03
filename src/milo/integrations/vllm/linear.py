"""vLLM's linear layers over compressed matrices.

A layer has a piece for each stored matrix: `q_proj`, `k_proj` and `v_proj` of a `qkv_proj`, each with bits, groups and
rank of its own. Neighbours that differ in rank alone are stacked and are one launch. Shards follow from sizes alone: a
matrix is cut over its out-features where the layer holds fewer than it has, over its in-features likewise. A
compensator follows its matrix: `U` is cut over out-features, `V` over in-features, so that the partial products of a
row-parallel layer, compensator included, add up in vLLM's own all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from milo.errors import FormatError, ServingError
from milo.integrations.vllm.config import MiloQuantizationConfig, Source
from milo.integrations.vllm.pieces import Piece, Waiting, empty, share, stored_dtypes
from milo.integrations.vllm.start import check_kernels, is_dummy, prepare
from milo.kernels.layout import TILE, repack
from milo.kernels.stacking import MAX_STACK, stack
from milo.modules.packed import PackedWeight

_SHARDS = ("q", "k", "v")


class CompressedPart(nn.Module):
    """One matrix of a layer, or neighbours that stack; this rank's shard, in the kernels' layout."""

    def __init__(self, pieces: Sequence[Piece], dtype: torch.dtype) -> None:
        super().__init__()
        first = pieces[0]
        packed = [repack([[piece.take()]], piece.encoding, piece.shape) for piece in pieces]
        self.packed = PackedWeight(stack(packed) if len(packed) > 1 else packed[0])
        self.rows, self.pad = first.rows.lead, (first.columns.lead, first.tail)
        prepare(self.packed.matrix, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(self.pad):
            x = F.pad(x, self.pad)
        # The operator itself, because vLLM traces this: what `ops.linear` checks is known here.
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.milo.linear(rows, self.packed.tensors, self.packed.numbers, None)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y[..., self.rows :] if self.rows else y


class DensePiece:
    """A part of a merged layer that the plan left alone; stands where a `Piece` would."""

    def __init__(
        self, name: str, shape: tuple[int, int], rank: int, ranks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self._shape, self._place, self._dtype, self._device = name, shape, (rank, ranks), dtype, device
        self._weight: torch.Tensor | None = None

    @property
    def missing(self) -> list[str]:
        return [f"{self.name}.weight"] if self._weight is None else []

    def add(self, suffix: str, tensor: torch.Tensor) -> None:
        rank, ranks = self._place
        for dim, size in enumerate(self._shape):
            pieces = tensor.shape[dim] // size
            tensor = tensor.narrow(dim, rank * pieces // ranks * size, size)
        self._weight = tensor.to(self._device, self._dtype, copy=True)

    def fill(self) -> None:
        self._weight = torch.full(self._shape, 1e-3, dtype=self._dtype, device=self._device)

    def take(self) -> torch.Tensor:
        assert self._weight is not None
        return self._weight


class DensePart(nn.Module):
    """A part that is not compressed."""

    def __init__(self, piece: DensePiece) -> None:
        super().__init__()
        self.weight = nn.Parameter(piece.take(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def stacks(above: Piece | DensePiece, below: Piece | DensePiece) -> bool:
    """Whether a matrix and the one after it can be one launch."""
    if isinstance(above, DensePiece) or isinstance(below, DensePiece) or above.rows.lead or below.rows.lead:
        return False
    ways = [
        (p.columns.lead, p.tail, p.shape[1], p.encoding.plane_bits, p.encoding.planes, p.encoding.group_size)
        for p in (above, below)
    ]
    return ways[0] == ways[1] and above.shape[0] % TILE == 0


class MiloLinearMethod(LinearMethodBase):
    """Loads and applies one linear layer.

    Args:
        config: of the model.
        sources: the stored matrix of each part of the layer; None if vLLM does not say which layer it is, so that its
            tensors have to (see `names`).
    """

    def __init__(self, config: MiloQuantizationConfig, sources: Sequence[Source] | None) -> None:
        self._config, self._sources = config, sources
        self._pieces: list[Piece | DensePiece] = []
        self._waiting = Waiting([])

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register a parameter without elements for every kind of stored tensor; the arguments are vLLM's."""
        check_kernels(torch.get_default_device(), params_dtype)
        self._dtype, self._dummy = params_dtype, is_dummy(get_current_vllm_config())
        self._device, self._sizes = torch.get_default_device(), (output_partition_sizes, input_size_per_partition)
        dtypes = {"weight": params_dtype}
        if self._sources is None:
            for row in self._config.plan.rows:
                dtypes |= stored_dtypes(row)
        else:
            self._bind(layer, self._sources)
            if all(source.row for source in self._sources):
                del dtypes["weight"]
            for source in self._sources:
                dtypes |= stored_dtypes(source.row) if source.row else {}
        for suffix, dtype in dtypes.items():
            layer.register_parameter(suffix, empty(dtype, partial(self._load, layer, suffix)))
        if "weight" not in dtypes:  # without elements: vLLM 0.26's latent attention asks kv_b_proj.weight for its dtype
            layer.register_buffer("weight", torch.empty(0, dtype=params_dtype), persistent=False)

    def _bind(self, layer: LinearBase, sources: Sequence[Source]) -> None:
        """Say what each part of the layer waits for."""
        outs, ins = self._sizes
        if len(sources) != len(outs):
            names = ", ".join(source.name for source in sources)
            raise ServingError(f"vLLM's layer has {len(outs)} parts, the checkpoint stores {names}")
        rank, ranks = layer.tp_rank, layer.tp_size
        for source, out in zip(sources, outs, strict=True):
            if source.row is None:
                shape = (out, ins)
                self._pieces.append(DensePiece(source.name, shape, rank, ranks, self._dtype, self._device))
                continue
            rows = source.rows(out, rank, ranks)
            columns = share(source.name, "in-features", source.row.shape[1], ins, rank, ranks)
            self._pieces.append(Piece(source.row, 0, rows, columns, self._device))
        self._waiting = Waiting(self._pieces)

    def _load(
        self,
        layer: LinearBase,
        suffix: str,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | None = None,
    ) -> None:
        self._config.check_complete()
        if hasattr(layer, "milo"):
            raise FormatError(f"{suffix} of {layer.prefix} comes twice; a running model's weights cannot be replaced")
        if not self._pieces:
            stored = getattr(loaded_weight, "milo_name", None)
            if stored is None:
                raise ServingError("vLLM builds a layer without a name and loads it in a way the plugin cannot follow")
            self._bind(layer, self._config.sources(self._config.layer_of(stored.removesuffix(f".{suffix}"))))
        if loaded_shard_id is None and len(self._pieces) > 1:
            raise ServingError(f"{self._pieces[0].name} and its neighbours are stored as one tensor, which is not read")
        number = _SHARDS.index(loaded_shard_id) if isinstance(loaded_shard_id, str) else loaded_shard_id or 0
        self._waiting.add(self._pieces[number], suffix, loaded_weight)
        if self._waiting.over:
            self._finish(layer)

    def _finish(self, layer: LinearBase) -> None:
        runs: list[list[Piece | DensePiece]] = []
        for piece in self._pieces:
            if runs and stacks(runs[-1][-1], piece) and len(runs[-1]) < MAX_STACK:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        parts: list[nn.Module] = []
        for run in runs:
            compressed = [piece for piece in run if isinstance(piece, Piece)]
            parts += [CompressedPart(compressed, self._dtype)] if compressed else []
            parts += [DensePart(piece) for piece in run if isinstance(piece, DensePiece)]
        layer.milo = nn.ModuleList(parts)
        self._pieces = []

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Weights were packed when the last of them came; here they are made up, if that was asked for.

        Raises:
            FormatError: a tensor is missing.
        """
        if not hasattr(layer, "milo"):
            if not self._pieces:
                raise FormatError("nothing came out of the checkpoint for a layer that vLLM builds without a name")
            self._waiting.end(self._dummy)
            self._finish(layer)

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x · Ŵᵀ + bias` of this rank; vLLM gives the bias of a row-parallel layer to one rank only."""
        parts = [part(x) for part in layer.milo]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias
