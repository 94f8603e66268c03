"""What transformers knows of a model's structure: where each checkpoint tensor goes.

Since version 5, transformers holds a layer's experts as 3-D parameters and describes in its weight conversions how
checkpoint tensors are renamed, stacked and concatenated into them. This file asks those descriptions (and the flags
that `use_experts_implementation` leaves on experts classes) instead of knowing models: one path serves them all,
and what the descriptions do not cover is refused by the class's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from milo.checkpoint.inventory import Placement
from milo.errors import CheckpointError

EXPERTS_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts(module: nn.Module) -> bool:
    """Whether the module follows transformers' experts contract (its class carries the decorator's flags)."""
    return all(hasattr(module, flag) for flag in EXPERTS_FLAGS)


def meta_model(folder: Path) -> PreTrainedModel | None:
    """The model of a checkpoint folder without weights, or None if transformers has no class for it.

    Remote code is never run: a checkpoint that brings its own class counts as unknown.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError):  # OSError: no readable config.json, which the checkpoint reports itself
        return None
    names = list(config.architectures or [])
    model_class = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if model_class is None:
        return None
    try:
        with torch.device("meta"):
            model = model_class._from_config(config)
    except (ValueError, AttributeError, TypeError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{folder}/config.json does not build a {names[0]}: {error}") from error
    return model.eval()


def placements(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, Placement]:
    """Where each checkpoint tensor goes in `model`; tensors the model does not use are absent.

    Args:
        model: on any device, meta included.
        shapes: checkpoint tensor names, with their shapes if known (a conversion may depend on them).
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: (c, i) for c in converters for i, pattern in enumerate(c.source_patterns)}
    state: dict[str, Any] = dict(model.state_dict())
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    tied = frozenset(pairs) | frozenset(pairs.values())
    found = {}
    for name, shape in shapes.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target in state:
            converter, part = by_pattern.get(pattern or "", (None, 0))
            found[name] = _place(model, target, state[target], shape, converter, part, tied)
    return found


def _place(
    model: PreTrainedModel,
    target: str,
    value: torch.Tensor,
    shape: tuple[int, ...] | None,
    converter: WeightConverter | None,
    part: int,
    tied: frozenset[str],
) -> Placement:
    path, _, parameter = target.rpartition(".")
    module = model.get_submodule(path)
    owner = type(module).__name__
    if isinstance(module, nn.Linear) and parameter == "weight":
        # A subclass with a forward of its own (grouped, quantised, ...) is no plain x·Wᵀ.
        plain = type(module).forward is nn.Linear.forward and converter is None and target not in tied
        return Placement(path, parameter, owner, "linear" if plain else "other")
    if not _is_expert_weight(path, parameter, owner, value):
        return Placement(path, parameter, owner, "other")
    if target in tied:
        return Placement(path, parameter, owner, "refused", reason="its weights are tied to another module's")
    if not is_experts(module) or value.ndim != 3:
        reason = "the class does not follow transformers' experts contract (use_experts_implementation)"
        return Placement(path, parameter, owner, "refused", reason=reason)
    swapped = bool(module.is_transposed)
    parts = 1
    if converter is not None:
        operations = [_describe(op) for op in converter.operations]
        parts = len(converter.source_patterns)
        if operations == ["Transpose(1, 2)"] and parts == 1:
            # Some conversions look first whether the checkpoint is already in the model's layout.
            same = getattr(converter.operations[0], "check_dims", False) and shape == tuple(value.shape)
            swapped = swapped if same else not swapped
        elif operations not in (
            ["MergeModulelist(0)"],
            ["MergeModulelist(0)", "Concatenate(1)"],
            ["Concatenate(1)"],
        ):
            reason = f"weight conversion {' + '.join(operations)}"
            return Placement(path, parameter, owner, "refused", reason=reason)
        elif swapped:
            return Placement(path, parameter, owner, "refused", reason="experts merged in a transposed layout")
        if len(converter.target_patterns) > 1:
            return Placement(path, parameter, owner, "refused", reason="one tensor feeds several parameters")
    return Placement(path, parameter, owner, "experts", part, parts, swapped)


def _is_expert_weight(path: str, parameter: str, owner: str, value: torch.Tensor) -> bool:
    """A 3-D parameter of a module that is about experts, or a 2-D one right under `experts` (all of them in one)."""
    words = f"{path}.{owner}".lower()
    if value.ndim == 3:
        return "expert" in words or "moe" in words
    return value.ndim == 2 and ".experts" in f".{path}" and "bias" not in parameter and "router" not in words


def _describe(operation: Any) -> str:
    """`Concatenate(1)`: class and dimensions of a conversion, the only things of it that matter here."""
    fields: Mapping[str, Any] = vars(operation)
    dims = [str(fields[key]) for key in ("dim", "dim0", "dim1") if key in fields]
    return f"{type(operation).__name__}({', '.join(dims)})"
