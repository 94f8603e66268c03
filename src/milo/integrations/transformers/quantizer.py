"""The `milo` quantizer of transformers: loads compressed folders, compresses on load, saves bit-exactly.

Loading replaces modules on the meta device and leaves the rest to transformers' loader, which finds every packed
tensor under its own name. Compressing on load (`from_pretrained(ORIGINAL, quantization_config=MiloConfig())`) plans
from the checkpoint's headers, then solves each parameter the moment it is read, so that the 16-bit model never
exists as a whole; the result is that of `milo quantize`, bit for bit when loaded in the source dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from milo.checkpoint.compressed import QUANT_METHOD, plan_from_config
from milo.checkpoint.source import Checkpoint
from milo.errors import CheckpointError
from milo.integrations.transformers.assembly import (
    Conversion,
    Site,
    anchored,
    finish,
    fused_parameters,
    mark_initialized,
    sites,
    touches,
)
from milo.integrations.transformers.source import source_of
from milo.modules.packed import use_kernels
from milo.pipeline.compress import quantization_config
from milo.pipeline.planning import plan_source
from milo.pipeline.work import one_thread, pieces, solve_piece
from milo.plan.plan import Plan
from milo.plan.recipe import DEFAULT, Recipe, custom_recipe
from milo.solve.stack import Solved


@register_quantization_config(QUANT_METHOD)
class MiloConfig(QuantizationConfigMixin):
    """How to compress, or (read from a compressed folder) how it was compressed.

    Args:
        recipe: `rtn`, `hqq`, `milo-s1` or `milo-s2`; the other arguments override what it says.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128.
        ranks: rank policy, e.g. `dense:512+kurtosis:16`.
        grid: `rtn` or `hqq`.
        rounds: solves of the alternation at most.
        factor: `int3`, `int8` or `fp16`.
        scale_bits: 16, 8 or 6.
        zero_bits: 16, 8 or 6.
        counts: routing counts by experts block, for the frequency policy (`milo profile` writes them).
        kwargs: the fields of a compressed folder's `quantization_config`.

    Raises:
        PlanError: a value that does not exist.
    """

    def __init__(
        self,
        recipe: str = DEFAULT,
        bits: int | None = None,
        group_size: int | None = None,
        ranks: str | None = None,
        grid: str | None = None,
        rounds: int | None = None,
        factor: str | None = None,
        scale_bits: int | None = None,
        zero_bits: int | None = None,
        counts: dict[str, list[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.recipe, self.ranks, self.grid, self.rounds, self.counts = recipe, ranks, grid, rounds, counts
        self.bits, self.group_size, self.factor = bits, group_size, factor
        self.scale_bits, self.zero_bits = scale_bits, zero_bits
        self.compressed: dict[str, Any] | None = None
        if "plan" in kwargs:
            self.compressed = {**kwargs, "quant_method": QUANT_METHOD}
        self.for_model({})  # bad values are refused here, not an hour into a run

    def for_model(self, config: dict[str, Any]) -> Recipe:
        """The recipe for a model with this `config.json`."""
        return custom_recipe(
            self.recipe,
            config,
            ranks=self.ranks,
            grid=self.grid,
            rounds=self.rounds,
            bits=self.bits,
            group_size=self.group_size,
            factor=self.factor,
            scale_bits=self.scale_bits,
            zero_bits=self.zero_bits,
        )

    def to_dict(self) -> dict[str, Any]:
        """What goes into `config.json`: the compressed model's fields, or the knobs before compression."""
        if self.compressed is not None:
            return dict(self.compressed)
        return {key: value for key, value in vars(self).items() if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def set_plan(self, plan: Plan, base_model: str | None) -> None:
        """Record what was done."""
        self.compressed = quantization_config(plan, base_model)

    def plan(self, where: str) -> Plan:
        """The plan of a compressed model, checked."""
        return plan_from_config(self.compressed or {}, where)


@register_quantizer(QUANT_METHOD)
class MiloQuantizer(HfQuantizer):
    """transformers calls this; see the module's docstring."""

    requires_calibration = False

    def __init__(self, quantization_config: MiloConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._sites: list[Site] = []
        self._plan: Plan | None = None
        self._pending: dict[str, list[Site]] = defaultdict(list)
        self._held: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = cast(MiloConfig, self.quantization_config)
        if self.pre_quantized:
            self._plan = config.plan(model.config.name_or_path or type(model).__name__)
            self._sites = sites(model, self._plan)
            for site in self._sites:
                site.attach(model)
            finish(model, self._sites)
            self._dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
            return
        if not checkpoint_files:
            raise CheckpointError("compressing on load needs a checkpoint on disk; use milo.compress_model instead")
        checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        source = source_of(checkpoint, model)
        self._plan = plan_source(source, config.for_model(checkpoint.config), counts=config.counts)
        self._sites = sites(model, self._plan)
        for site in self._sites:
            for parameter in _parameters(site):
                self._pending[parameter].append(site)
        config.set_plan(self._plan, model.config.name_or_path)

    def update_weight_conversions(
        self, weight_conversions: list[Conversion], model: PreTrainedModel | None = None
    ) -> list[Conversion]:
        if not self.pre_quantized:
            return weight_conversions
        return anchored(weight_conversions, fused_parameters(self._sites))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._pending

    def get_quantize_ops(self) -> ConversionOps:
        assert self._plan is not None
        return _CompressOnLoad(self._pending, self._plan.rounds, self._held)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            _settle_dtypes(model, self._dtypes)
        else:
            finish(model, self._sites)
            keep_plain_conversions(model, self._sites)
        use_kernels(model)
        return model


class _CompressOnLoad(ConversionOps):
    """Solves the rows that a freshly read parameter feeds and puts the result in its place.

    Experts that are separate linears are held back until all of a row are there: a row is solved as one stack,
    whoever solves it, so that the result does not depend on the way it was read.
    """

    def __init__(self, pending: dict[str, list[Site]], rounds: int, held: dict[str, torch.Tensor]) -> None:
        self._pending, self._rounds, self._held = pending, rounds, held

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        model: nn.Module = kwargs["model"]
        missing_keys: set[str] | None = kwargs["missing_keys"]
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            for site in self._pending[name]:
                if site.placement.kind == "experts":
                    compress_site(site, model, site.cut(weight, model), self._rounds)
                    continue
                self._held[name] = weight
                members = _parameters(site)
                if all(member in self._held for member in members):
                    stack = torch.stack([self._held.pop(member) for member in members])
                    compress_site(site, model, stack, self._rounds)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def compress_site(site: Site, model: nn.Module, weight: torch.Tensor, rounds: int) -> list[Solved]:
    """Solve one row from `weight [E, N, K]` and attach the result.

    Args:
        site: where it goes.
        model: the model.
        weight: its weights.
        rounds: solves at most.

    Returns:
        The solved matrices.
    """
    parts = pieces(site.row, weight.device.type)
    with one_thread():
        solved = [s for part in parts for s in solve_piece(_cut(weight, part), site.row, part, rounds)]
    site.attach(model, solved)
    for matrix in site.matrices(model):
        for tensor in matrix.parameters():
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    mark_initialized(model, site.placement.module)
    return solved


def keep_plain_conversions(model: PreTrainedModel, all_sites: list[Site]) -> None:
    """Leave only conversions that do not touch compressed parameters, so that saving writes packed names as they are.

    Experts are registered under their checkpoint names already; splitting a fused parameter that is gone has
    nothing to do, but its pattern could match a stack of the same name.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not from from_pretrained: what save_pretrained would take itself
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    experts = fused_parameters(all_sites)
    setattr(model, "_weight_conversions", [c for c in conversions if not touches(c, experts)])  # noqa: B010


def _settle_dtypes(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast uncompressed parameters to the dtype that was asked for.

    Before 5.22 transformers loads every renamed tensor of a pre-quantised checkpoint in the file's dtype, which is
    right for packed tensors and wrong for a router beside them. Parameters a model keeps in float32 stay.
    """
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    keep |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        if parameter.dtype != wanted and not any(word in name for word in keep):
            parameter.data = parameter.data.to(wanted)


def _cut(weight: torch.Tensor, members: range) -> torch.Tensor:
    return weight if len(members) == weight.shape[0] else weight[members.start : members.stop]


def _parameters(site: Site) -> list[str]:
    if site.placement.kind == "linear":
        return [f"{path}.weight" for path in site.paths]
    return [f"{site.placement.module}.{site.placement.parameter}"]
