"""Compressing a model that is already in memory, and saving it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from milo.checkpoint.compressed import REPORT
from milo.checkpoint.inventory import Group, Inventory, Placement, take_inventory
from milo.checkpoint.writer import write_atomically
from milo.errors import MiloError
from milo.integrations.transformers.assembly import Site, finish, sites
from milo.integrations.transformers.quantizer import (
    MiloConfig,
    MiloQuantizer,
    compress_site,
    keep_plain_conversions,
)
from milo.integrations.transformers.structure import placements
from milo.modules.packed import use_kernels
from milo.pipeline.card import model_card
from milo.pipeline.compress import describe, summary
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.statistics import WeightStatistics


@dataclass(frozen=True)
class _Head:
    name: str
    dtype: str
    shape: tuple[int, ...]


@torch.no_grad()
def compress_model(
    model: PreTrainedModel,
    config: MiloConfig | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> PreTrainedModel:
    """Compress a transformers model in place, matrix by matrix, on the device its weights are on.

    Args:
        model: loaded in a floating dtype.
        config: the recipe; `milo-s1` by default.
        progress: called with (weights done, all, name).

    Returns:
        The same model, ready for use and for `save_compressed` or `save_pretrained`.

    Raises:
        UnsupportedModelError: experts that MiloConfig cannot find or understand.
        PlanError, WeightError: as for `milo quantize`.
    """
    if getattr(model, "is_quantized", False):
        raise MiloError(f"{type(model).__name__} is already quantised")
    config = config or MiloConfig()
    settings = model.config.to_dict()
    inventory, _ = inventory_of(model)
    by_name: dict[str, Site] = {}

    def read(group: Group) -> Callable[[int], torch.Tensor]:
        return by_name[group.name].source(model).__getitem__

    recipe = config.for_model(settings)
    blank = make_plan(inventory, replace(recipe, ranks="none"), settings, Evidence(lambda group: []))
    by_name.update({site.row.name: site for site in sites(model, blank)})
    evidence = Evidence(WeightStatistics(read).kurtosis, config.counts)
    plan = make_plan(inventory, recipe, settings, evidence)

    all_sites = sites(model, plan)
    done, matrices = 0, []
    for site in all_sites:
        progress(done, plan.parameters, site.row.name)
        solved = compress_site(site, model, site.source(model), plan.rounds)
        matrices += [describe(site.row, member, result) for member, result in enumerate(solved)]
        done += site.row.parameters
    progress(done, plan.parameters, "")
    finish(model, all_sites)
    keep_plain_conversions(model, all_sites)

    config.set_plan(plan, model.config.name_or_path or None)
    model.config.quantization_config = config
    attributes = {
        "hf_quantizer": MiloQuantizer(config, pre_quantized=True),
        "is_quantized": True,
        "quantization_method": config.quant_method,
        "milo_report": {**summary(plan, []), "matrices": matrices},
    }
    use_kernels(model)
    for name, value in attributes.items():  # what from_pretrained sets, and the report for save_compressed
        setattr(model, name, value)
    return model


def save_compressed(model: PreTrainedModel, folder: str | Path, **kwargs: Any) -> None:
    """`save_pretrained` plus the model card and, if the model was compressed in this process, the error report.

    Args:
        model: from `compress_model` or loaded from a compressed folder.
        folder: output.
        kwargs: passed on to `save_pretrained` (e.g. `max_shard_size`).

    Raises:
        MiloError: the model is not compressed.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, MiloConfig) or config.compressed is None:
        raise MiloError(f"{type(model).__name__} is not compressed; call milo.compress_model first")
    model.save_pretrained(folder, **kwargs)
    report = getattr(model, "milo_report", None)
    if report is not None:
        files = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        report = {**report, "files_bytes": files}
        write_atomically(Path(folder) / REPORT, json.dumps(report, indent=1))
        card = model_card({"quantization_config": config.to_dict()}, report, config.compressed.get("base_model"))
        write_atomically(Path(folder) / "README.md", card)


def inventory_of(model: PreTrainedModel) -> tuple[Inventory, dict[str, Placement]]:
    """The inventory of a model in memory, under the names `save_pretrained` would write, and its placements."""
    shapes = checkpoint_shapes(model)
    placed = placements(model, shapes)
    heads = [_Head(name, "F32", shape) for name, shape in shapes.items()]
    return take_inventory(heads, model.config.to_dict(), placed), placed


def checkpoint_shapes(model: PreTrainedModel) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes that `save_pretrained` would write, without copying a weight."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: t.to("meta") for name, t in model.state_dict().items() if name not in tied}
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, state).items()}
