"""Putting compressed matrices into a transformers model, in place.

A `Site` says for one row of the plan where its matrices go: the path each one is registered under (its checkpoint
name after the model's renamings, so that loading and saving are plain state-dict operations) and the parameter it
replaces. Loading attaches empty matrices to a model on the meta device; compressing in memory attaches solved ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

from milo.checkpoint.inventory import Kind, Placement
from milo.errors import FormatError, UnsupportedModelError
from milo.integrations.transformers.structure import is_experts, placements
from milo.modules.experts import Projection, compress_experts
from milo.modules.matrix import CompressedLinear, CompressedMatrix
from milo.plan.plan import Plan, Row
from milo.solve.stack import Solved

Conversion = WeightTransform  # WeightRenaming or WeightConverter


@dataclass(frozen=True)
class Site:
    """Where the matrices of one row go.

    Attributes:
        row: the plan's row.
        placement: the parameter they replace (of the first member).
        paths: module path of each stored matrix.
    """

    row: Row
    placement: Placement
    paths: tuple[str, ...]

    def source(self, model: nn.Module) -> torch.Tensor:
        """The weights to compress, `[E, N, K]`, from the model's parameters."""
        if self.placement.kind == "linear":
            return torch.stack([_linear(model, path).weight.data for path in self.paths])
        return self.cut(getattr(model.get_submodule(self.placement.module), self.placement.parameter).data, model)

    def cut(self, parameter: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """This row's part of a fused experts parameter, as `[E, N, K]`."""
        stack = parameter.mT if model.get_submodule(self.placement.module).is_transposed else parameter
        size = stack.shape[1] // self.placement.parts
        return stack[:, self.placement.part * size : (self.placement.part + 1) * size]

    def attach(self, model: nn.Module, solved: Sequence[Solved] | None = None) -> None:
        """Register the matrices, filled with `solved`, or uninitialised on the meta device."""
        row, stacked = self.row, self.row.kind is Kind.STACK
        device = next(iter(solved[0].tensors.values())).device if solved else torch.device("meta")
        matrices: list[CompressedMatrix] = []
        if self.placement.kind == "linear":
            for path, rank in zip(self.paths, row.ranks, strict=True):
                matrices.append(CompressedLinear.like(_linear(model, path), row.encoding, rank, device))
        elif stacked:
            matrices.append(CompressedMatrix(row.encoding, row.shape, row.ranks, True, device))
        else:
            matrices += [CompressedMatrix(row.encoding, row.shape, [rank], False, device) for rank in row.ranks]
        for member, result in enumerate(solved or ()):
            matrices[0 if stacked else member].fill(member if stacked else 0, result.tensors)
        for path, matrix in zip(self.paths, matrices, strict=True):
            _register(model, path, matrix)

    def matrices(self, model: nn.Module) -> list[CompressedMatrix]:
        """The attached matrices."""
        return [model.get_submodule(path) for path in self.paths]  # type: ignore[misc]


def sites(model: PreTrainedModel, plan: Plan) -> list[Site]:
    """A site for every row of the plan.

    Raises:
        FormatError: the plan names matrices that the model does not have, or of another shape.
    """
    renamings = [c for c in anchored(get_model_conversion_mapping(model), set()) if isinstance(c, WeightRenaming)]
    names = {candidate for row in plan.rows for candidate in _source_names(row, 0)}
    placed = placements(model, dict.fromkeys(names))
    return [_site(model, row, placed, renamings) for row in plan.rows]


def fused_parameters(all_sites: Sequence[Site]) -> set[str]:
    """Names of the experts parameters that the sites replace."""
    places = [site.placement for site in all_sites if site.placement.kind == "experts"]
    return {f"{place.module}.{place.parameter}" for place in places}


def finish(model: PreTrainedModel, all_sites: Sequence[Site]) -> None:
    """Swap the classes of the experts blocks whose matrices are attached.

    Raises:
        UnsupportedModelError: an experts block keeps an uncompressed projection.
    """
    blocks: dict[str, dict[str, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site in all_sites:
        if site.placement.kind == "experts":
            blocks[site.placement.module][site.placement.parameter].append(site)
    for path, parameters in blocks.items():
        experts = model.get_submodule(path)
        projections = {}
        for parameter, parts in parameters.items():
            ordered = sorted(parts, key=lambda site: site.placement.part)
            if len(ordered) != ordered[0].placement.parts:
                raise UnsupportedModelError(f"{path}.{parameter}: only {len(ordered)} of its parts are in the plan")
            projections[parameter] = Projection([site.matrices(model) for site in ordered])
            if parameter in experts._parameters:
                del experts._parameters[parameter]
        compress_experts(experts, projections)
        mark_initialized(model, path)
    for path, module in model.named_modules():
        kept = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if is_experts(module) and kept and path in blocks:
            raise UnsupportedModelError(f"{path}.{kept[0]} ({type(module).__name__}) stays uncompressed")


def mark_initialized(model: nn.Module, path: str) -> None:
    """Keep the model's own `_init_weights` away from a module whose parameters are gone, and from its parent.

    Some models initialise an experts block from the block around it. A parent with buffers is left to transformers,
    which may have to fill them; none of those reach into their experts.
    """
    model.get_submodule(path)._is_hf_initialized = True  # type: ignore[assignment]
    parent = model.get_submodule(path.rpartition(".")[0])
    if next(parent.buffers(recurse=False), None) is None:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def anchored(conversions: Sequence[Conversion], experts: set[str]) -> list[Conversion]:
    """Conversions that leave packed names alone: `…w1.weight` must not match inside `…w1.weight_packed`.

    Args:
        conversions: the model's.
        experts: names of the fused parameters that are compressed.

    transformers 5.22 ends patterns at a name boundary by itself, but a `.` may still follow (a converter of
    `experts.down_proj` would take `experts.down_proj.weight_packed`).
    """
    cut_short = WeightRenaming("a.weight", "b.weight").rename_source_key("a.weight_packed")[0] != "a.weight_packed"
    return [_anchor(c) if _reaches(c, experts, cut_short) else c for c in conversions]


def touches(conversion: Conversion, experts: set[str]) -> bool:
    """Whether a conversion writes one of the named parameters."""
    tails = [target.replace("\\.", ".").lstrip("^") for target in conversion._original_target_patterns]
    return any(name.endswith(tail) for name in experts for tail in tails)


def _reaches(conversion: Conversion, experts: set[str], cut_short: bool) -> bool:
    if type(conversion) is WeightConverter:
        return touches(conversion, experts)
    ends = any(source.endswith("weight") for source in conversion._original_source_patterns)
    return type(conversion) is WeightRenaming and cut_short and ends


def _anchor(conversion: Conversion) -> Conversion:
    # A negative lookahead, because transformers strips those (and not `$`) when it reverses a conversion to save.
    sources = [f"{source}(?![\\w.])" for source in conversion._original_source_patterns]
    targets = list(conversion._original_target_patterns)
    if isinstance(conversion, WeightConverter):
        copy: Conversion = WeightConverter(sources, targets, operations=list(conversion.operations))
    else:
        copy = WeightRenaming(sources, targets)
    for scope in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(conversion, scope):
            setattr(copy, scope, getattr(conversion, scope))
    return copy


def _site(
    model: PreTrainedModel, row: Row, placed: Mapping[str, Placement], renamings: Sequence[WeightRenaming]
) -> Site:
    placement = next((placed[name] for name in _source_names(row, 0) if name in placed), None)
    if placement is None or placement.kind not in ("linear", "experts"):
        raise FormatError(
            f"the plan compresses {row.name}, but {type(model).__name__} has no such linear layer or experts block"
        )
    if placement.kind == "linear":
        shape = tuple(_linear(model, placement.module).weight.shape)
        if shape != row.shape:
            raise FormatError(f"{row.name} is {row.shape} in the plan but {shape} in {type(model).__name__}")
    paths = tuple(_path(matrix, placement, model, renamings) for matrix in row.matrices())
    return Site(row, placement, paths)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(path))


def _path(matrix: str, placement: Placement, model: PreTrainedModel, renamings: Sequence[WeightRenaming]) -> str:
    """Module path under which the loader will look for `matrix.weight_packed`."""
    key = f"{matrix}.weight_packed"
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    path = key.removesuffix(".weight_packed")
    prefix = f"{model.base_model_prefix}."
    # Loading a bare model from the checkpoint of one with a head, or the reverse.
    head = placement.module.split(".")[0]
    if path.startswith(prefix) and f"{head}." != prefix and not hasattr(model, model.base_model_prefix):
        return path.removeprefix(prefix)
    if not path.startswith(prefix) and f"{head}." == prefix:
        return prefix + path
    return path


def _source_names(row: Row, member: int) -> Iterator[str]:
    matrix = row.matrices()[member]
    yield f"{matrix}.weight"
    if row.kind is Kind.STACK:
        yield matrix


def _register(model: nn.Module, path: str, matrix: CompressedMatrix) -> None:
    """Put a module at a path, making bare containers on the way and replacing what stands there."""
    *parents, leaf = path.split(".")
    module = model
    for name in parents:
        child = module._modules.get(name)
        if child is None:
            child = nn.Module()
            module.add_module(name, child)
        module = child
    module._parameters.pop(leaf, None)  # a stack takes the place and the name of the parameter it replaces
    module._modules[leaf] = matrix
