"""vLLM's routed experts over compressed matrices: one call of `milo.ops.moe_ffn` a layer.

vLLM's parameters `w13_…` and `w2_…` receive the stored tensors of `w1` (gate), `w3` (up) and `w2` (down), expert by
expert. Tensor parallelism cuts gate and up over out-features and down over the same in-features, so leads meet (see
`milo.format.shards`); expert parallelism keeps some experts whole and passes vLLM's map of them to the operator.
Router, shared experts and reductions are vLLM's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts

from milo import ops
from milo.errors import FormatError, ServingError
from milo.format.matrix import FACTOR_GROUP
from milo.format.shards import Span
from milo.integrations.vllm.config import MiloQuantizationConfig, Source
from milo.integrations.vllm.pieces import Piece, Waiting, empty, share, stored_dtypes
from milo.integrations.vllm.start import check_kernels, is_dummy, prepare
from milo.kernels.layout import repack
from milo.kernels.packed_reference import ACTIVATIONS
from milo.modules.packed import PackedWeight
from milo.plan.plan import Row


class MiloExpertsMethod(FusedMoEMethodBase):
    """Loads and applies the experts of one layer.

    Args:
        config: of the model.
        moe: vLLM's description of the layer.
        prefix: the layer's path.
        sources: where gate, up and down are stored.

    Raises:
        ServingError: experts that `moe_ffn` cannot compute.
    """

    def __init__(
        self, config: MiloQuantizationConfig, moe: FusedMoEConfig, prefix: str, sources: Sequence[Source]
    ) -> None:
        super().__init__(moe)
        self._config, self._prefix = config, prefix
        self._sources = dict(zip(("w1", "w3", "w2"), sources, strict=True))
        self._rows = {key: source.row for key, source in self._sources.items() if source.row}
        reason = _why_not(moe, self._rows) or _why_not_halves(sources[1])
        if reason:
            raise ServingError(f"the vLLM plugin cannot serve {prefix}: {reason}")
        self._activation = moe.activation.value
        self._pieces: dict[str, list[Piece]] = {}

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register a parameter without elements for every kind of stored tensor; the arguments are vLLM's."""
        device = torch.get_default_device()
        check_kernels(device, params_dtype, num_experts, self.moe.experts_per_token)
        self._dtype, self._dummy = params_dtype, is_dummy(get_current_vllm_config())
        self._locals = _local_experts(layer, self.moe.num_logical_experts)
        for key, row in self._rows.items():
            name = self._sources[key].name
            features = row.shape[0] if key == "w2" else row.shape[1]
            if features != hidden_size:
                raise ServingError(f"{name} has {features} features, vLLM's layer {hidden_size}")
            rank, ranks = self.moe.tp_rank, self.moe.tp_size
            inner, across = intermediate_size_per_partition, Span.all(hidden_size)
            if key == "w2":
                spans = across, share(name, "in-features", row.shape[1], inner, rank, ranks)
            else:
                spans = self._sources[key].rows(inner, rank, ranks), across
            self._pieces[key] = [Piece(row, expert, *spans, device) for expert in self._locals]
        if layer.apply_router_weight_on_input:
            raise ServingError(f"the vLLM plugin cannot serve {self._prefix}: router weights on the experts' inputs")
        self._waiting = Waiting([piece for pieces in self._pieces.values() for piece in pieces])
        for name, keys in (("w13", ("w1", "w3")), ("w2", ("w2",))):
            dtypes = {s: d for key in keys for s, d in stored_dtypes(self._rows[key]).items()}
            for suffix, dtype in dtypes.items():
                layer.register_parameter(f"{name}_{suffix}", empty(dtype, partial(self._load, layer, suffix)))

    def _load(
        self,
        layer: RoutedExperts,
        suffix: str,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        self._config.check_complete()
        local = self._locals.get(expert_id)
        if local is None:
            return False if return_success else None
        if hasattr(layer, "milo_down"):
            raise FormatError(f"{weight_name} comes twice; a running model's weights cannot be replaced")
        self._waiting.add(self._pieces[shard_id][local], suffix, loaded_weight)
        if self._waiting.over:
            self._finish(layer)
        return True if return_success else None

    def _finish(self, layer: RoutedExperts) -> None:
        gate, down = self._pieces["w1"][0], self._pieces["w2"][0]
        parts = [[piece.take() for piece in self._pieces[key]] for key in ("w1", "w3")]
        layer.milo_gate_up = PackedWeight(repack(parts, gate.encoding, gate.shape))
        del parts
        layer.milo_down = PackedWeight(repack([[p.take() for p in self._pieces["w2"]]], down.encoding, down.shape))
        self._pieces = {}
        prepare(layer.milo_gate_up.matrix, self._dtype)
        prepare(layer.milo_down.matrix, self._dtype)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Weights were packed when the last of them came; here they are made up, if that was asked for.

        Raises:
            FormatError: a tensor is missing.
        """
        if not hasattr(layer, "milo_down"):
            self._waiting.end(self._dummy)
            self._finish(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """vLLM's own kernels would want one."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's part of the experts' weighted sum; vLLM runs the shared experts and adds up."""
        first, second = layer.milo_gate_up.matrix, layer.milo_down.matrix
        return ops.moe_ffn(x, first, second, topk_ids, topk_weights, self._activation, layer.expert_map)


def _why_not(moe: FusedMoEConfig, rows: Mapping[str, Row]) -> str:
    """What of these experts `moe_ffn` cannot compute, or an empty string."""
    if len(rows) < 3:
        return "some of its projections are compressed and some are not"
    gate, up, down = (rows[key] for key in ("w1", "w3", "w2"))
    parallel = moe.moe_parallel_config
    for bad, reason in (
        (moe.activation.value not in ACTIVATIONS, f"its activation {moe.activation.value} is none of {ACTIVATIONS}"),
        (moe.swiglu_limit is not None, "its activation has a limit"),
        (moe.has_bias, "its experts have biases"),
        (gate.encoding != up.encoding, "gate and up are written in different ways"),
        (gate.encoding.planes > 1 or down.encoding.planes > 1, "experts have codes of 3 or 4 bits; these are wider"),
        (
            parallel.dp_size > 1 or parallel.is_sequence_parallel,
            "data parallelism within a model; use --tensor-parallel-size, with --enable-expert-parallel if you like, "
            "or a server for each replica",
        ),
        (moe.is_lora_enabled, "LoRA adapters on experts"),
        (
            len({moe.num_logical_experts, *(len(row.ranks) for row in rows.values())}) > 1,
            f"vLLM counts {moe.num_logical_experts} experts, the plan {len(gate.ranks)}",
        ),
    ):
        if bad:
            return reason
    return ""


def _why_not_halves(up: Source) -> str:
    """Gate and up in one matrix are cut apart, and either half begins at a group of U."""
    return "" if up.first % FACTOR_GROUP == 0 else f"gate and up of {up.first} out-features each in one matrix"


def _local_experts(layer: RoutedExperts, experts: int) -> dict[int, int]:
    """Where this rank's experts stand, by their numbers in the model, in order."""
    found = {expert: layer.expert_map_manager.map_global_to_local(expert) for expert in range(experts)}
    return dict(sorted(((e, place) for e, place in found.items() if place != -1), key=lambda item: item[1]))
