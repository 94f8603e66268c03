"""The inventory: every matrix of a checkpoint, its role, and which matrices are solved together.

Equal projections of one layer's experts form one *group* (`model.layers.3.mlp.experts.*.up_proj`, E members); any
other matrix is a group of its own. Fused checkpoints hold a group as one 3-D tensor (a *stack*), some of them with
in- and out-features swapped, which only the model's class can tell: that is what a `Placement` says.

Nothing here builds a model or imports transformers. Without placements (a class that transformers does not have,
such as the first DeepSeek-MoE's) names and shapes must be enough, and what they cannot decide is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any, Protocol

from milo.checkpoint.roles import EXPERT_INDEX, Role, role_of
from milo.errors import CheckpointError, UnsupportedModelError


class TensorHead(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Kind(StrEnum):
    """How a group stands in the checkpoint."""

    SINGLE = "single"  # one 2-D tensor
    EXPERTS = "experts"  # one 2-D tensor an expert
    STACK = "stack"  # one 3-D tensor


@dataclass(frozen=True)
class Placement:
    """Where the model's class puts a checkpoint tensor.

    Attributes:
        module: dotted path of the module that owns the parameter.
        parameter: the parameter's name in that module.
        owner: class name of that module.
        kind: `linear`, `experts` (a 3-D parameter of experts whose contract is understood), `refused` (experts whose
            contract is not understood) or `other`.
        part: position of this tensor among those that are concatenated into the parameter (gate 0, up 1).
        parts: how many there are.
        transposed: the checkpoint holds `[E, K, N]`.
        reason: for `refused`, what is not understood.
    """

    module: str
    parameter: str
    owner: str
    kind: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Group:
    """Matrices that are solved together.

    Attributes:
        name: matrix name without `.weight`; `*` stands for the expert's number.
        role: one of the compressed roles.
        kind: how the group stands in the checkpoint.
        members: checkpoint tensors in expert order (one for a single matrix or a stack).
        count: matrices, E.
        shape: `(N, K)` of each.
        dtype: source dtype, a safetensors name.
        transposed: the source holds `[E, K, N]`.
    """

    name: str
    role: Role
    kind: Kind
    members: tuple[str, ...]
    count: int
    shape: tuple[int, int]
    dtype: str
    transposed: bool = False

    @property
    def parameters(self) -> int:
        return self.count * prod(self.shape)

    @property
    def experts_path(self) -> str:
        """Path of the experts block, e.g. `model.layers.3.mlp.experts` (the key of routing counts)."""
        return self.name.split(".*")[0].rpartition(".expert_")[0] or (
            self.name.split(".*")[0] if self.kind is Kind.EXPERTS else self.name.rpartition(".")[0]
        )


@dataclass
class Inventory:
    """What a checkpoint holds.

    Attributes:
        groups: everything that can be compressed, in checkpoint order.
        left: the other tensors with their roles.
        expert_parameters: elements of all expert weights, compressible or not.
        small_experts: expert matrices too narrow to be compressed.
        head: an untied head. It is one of those left, but a plan for a number of bytes may compress it.
    """

    groups: list[Group]
    left: dict[str, Role]
    expert_parameters: int
    small_experts: list[str] = field(default_factory=list)
    head: Group | None = None

    @property
    def candidates(self) -> list[Group]:
        """Everything that a plan may compress."""
        return self.groups + ([self.head] if self.head else [])

    def kept(self, compressed: Container[str]) -> list[str]:
        """Tensors that are copied under a plan that compresses these groups."""
        return [name for name in self.left if name.removesuffix(".weight") not in compressed]

    def group(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)


MIN_COVERAGE = 0.95
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3")


def take_inventory(
    heads: Iterable[TensorHead],
    config: Mapping[str, Any],
    placements: Mapping[str, Placement] | None = None,
) -> Inventory:
    """Assign roles and form groups.

    Args:
        heads: every tensor of the checkpoint (block scales of FP8 weights excluded).
        config: the parsed `config.json`.
        placements: what the model's class says of each tensor, if transformers knows the class.

    Raises:
        UnsupportedModelError: no experts found, experts whose layout is not understood, a source that is already
            quantised, or less than 95 % of the expert parameters compressible.
        CheckpointError: experts missing from a layer, or experts of unequal shapes.
    """
    model = _model_name(config)
    _refuse_quantized(config, model)
    listed: dict[str, dict[int, TensorHead]] = defaultdict(dict)
    groups: dict[str, Group | None] = {}  # None: a group of experts whose members are still being collected
    left: dict[str, Role] = {}
    experts = 0
    small: list[str] = []
    output: Group | None = None
    for head in heads:
        placement = placements.get(head.name) if placements else None
        role = _role(head, placement, model)
        if placements is not None and placement is None and role.compressed:
            role = Role.OTHER  # the class does not load it (multi-token prediction layers): nobody could run it
        if role is Role.EXPERT or (EXPERT_INDEX.search(head.name) and _is_matrix(head)):
            experts += prod(head.shape)
        if not role.compressed:
            left[head.name] = role
            if EXPERT_INDEX.search(head.name) and _is_matrix(head):
                small.append(head.name)
            # Without the class nobody knows whether it is tied to the embedding.
            if role is Role.HEAD and placement and placement.kind == "linear" and head.dtype in _FLOATS:
                output = _single(head, role)
            continue
        if head.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{head.name} has dtype {head.dtype}, which is no floating-point weight; start from the original "
                "16-bit checkpoint"
            )
        matrix = head.name.removesuffix(".weight")
        if len(head.shape) == 3:
            groups[matrix] = _stack(head, matrix, role, placement, model)
        elif found := EXPERT_INDEX.search(head.name):
            template = EXPERT_INDEX.sub(rf"{found[1] or ''}*", matrix)
            listed[template][int(found[2])] = head
            groups.setdefault(template, None)
        else:
            groups[matrix] = _single(head, role)
    complete = [group or _experts(name, listed[name]) for name, group in groups.items()]
    inventory = Inventory(complete, left, experts, small, output)
    _check_coverage(inventory, model)
    return inventory


def _role(head: TensorHead, placement: Placement | None, model: str) -> Role:
    role = role_of(head.name, head.shape)
    if placement is None:
        if role.compressed and not head.name.endswith(".weight") and len(head.shape) == 2:
            return Role.OTHER
        return role
    if placement.kind == "refused":
        raise UnsupportedModelError(
            f"{model}: {placement.owner} holds experts ({head.name}) in a way MiLo does not understand: "
            f"{placement.reason}"
        )
    if placement.kind == "experts":
        return role if role.compressed else Role.EXPERT
    if role.compressed and placement.kind != "linear":
        return Role.OTHER
    return role


def _is_matrix(head: TensorHead) -> bool:
    return len(head.shape) == 2


def _single(head: TensorHead, role: Role) -> Group:
    shape = (head.shape[0], head.shape[1])
    return Group(head.name.removesuffix(".weight"), role, Kind.SINGLE, (head.name,), 1, shape, head.dtype)


def _stack(head: TensorHead, matrix: str, role: Role, placement: Placement | None, model: str) -> Group:
    if placement is None or placement.kind != "experts":
        raise UnsupportedModelError(
            f"{model}: {head.name} {tuple(head.shape)} fuses its experts into one tensor, and transformers has no "
            "class that says how; install a transformers version that knows this model"
        )
    count, first, second = head.shape
    shape = (second, first) if placement.transposed else (first, second)
    return Group(matrix, role, Kind.STACK, (head.name,), count, shape, head.dtype, transposed=placement.transposed)


def _experts(name: str, members: dict[int, TensorHead]) -> Group:
    missing = sorted(set(range(max(members) + 1)) - set(members))
    if missing:
        raise CheckpointError(f"{name}.weight: expert {missing[0]} is missing; finish the download")
    heads = [members[i] for i in range(len(members))]
    unequal = next((h for h in heads if h.shape != heads[0].shape or h.dtype != heads[0].dtype), None)
    if unequal is not None:
        raise UnsupportedModelError(
            f"{unequal.name} {tuple(unequal.shape)} {unequal.dtype} differs from {heads[0].name} "
            f"{tuple(heads[0].shape)} {heads[0].dtype}; experts of one projection must be alike"
        )
    shape = (heads[0].shape[0], heads[0].shape[1])
    names = tuple(h.name for h in heads)
    return Group(name, Role.EXPERT, Kind.EXPERTS, names, len(heads), shape, heads[0].dtype)


def _check_coverage(inventory: Inventory, model: str) -> None:
    if inventory.expert_parameters == 0:
        raise UnsupportedModelError(
            f"{model}: no experts found, neither `experts.<number>.` tensors nor a fused experts parameter; MiLo "
            "compresses Mixture-of-Experts models"
        )
    covered = sum(g.parameters for g in inventory.groups if g.role is Role.EXPERT)
    share = covered / inventory.expert_parameters
    if share < MIN_COVERAGE:
        where = f" (for instance {inventory.small_experts[0]})" if inventory.small_experts else ""
        raise UnsupportedModelError(
            f"{model}: only {share:.1%} of the expert parameters can be compressed{where}; {MIN_COVERAGE:.0%} is "
            "required, since a half-compressed model would look finished"
        )


def _refuse_quantized(config: Mapping[str, Any], model: str) -> None:
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "fp8"):
        raise UnsupportedModelError(
            f"{model} is already quantised (quant_method: {method}); start from the original checkpoint"
        )


def _model_name(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    return architectures[0] if architectures else str(config.get("model_type", "this model"))
