"""From stored tensors to the kernels: `use_kernels` repacks a model's compressed matrices, one at a time.

A matrix then lives in the kernels' layout alone: the stored tensors are given up as soon as they are repacked, so that
a model takes no more memory than before, and are made again, bit for bit, when somebody saves it. What the kernels
do not take keeps the reference path, and the reason is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from milo.format.matrix import FACTOR_GROUP, Encoding
from milo.format.rows import cut_rows, join_rows
from milo.kernels import decode
from milo.kernels.layout import TILE, PackedMatrix, repack, supports
from milo.kernels.packed_reference import ACTIVATIONS, activate
from milo.kernels.planes import lossless
from milo.kernels.unpack import unpack
from milo.modules.experts import CompressedExperts
from milo.modules.matrix import CompressedLinear, CompressedMatrix, device_only

_NAMES = ("codes", "meta", "u_codes", "u_scales", "v_codes", "v_meta", "table")


class PackedWeight(nn.Module):
    """A `PackedMatrix` as buffers: it moves with the model, keeps its dtypes and stays out of state dicts."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        for name, tensor in zip(_NAMES, matrix.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.numbers = matrix.numbers

    @property
    def tensors(self) -> list[torch.Tensor]:
        """As `PackedMatrix.tensors`; with `numbers`, what the operators in `torch.ops.milo` take."""
        return [getattr(self, name) for name in _NAMES]

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix.of(self.tensors, self.numbers)

    def unpack(
        self, member: int, first: int, parts: Sequence[int], ranks: Sequence[int], encoding: Encoding
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of one matrix.

        Args:
            member: of the stored stack; 0 where a matrix was stored alone.
            first: expert that member 0 is.
            parts: of the packed matrix that the stored one consists of, over out-features.
            ranks: of the members.
            encoding: how they were written.
        """
        packed = self.matrix
        return join_rows([unpack(packed, first + member, part, ranks[member], encoding) for part in parts])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeight:
        return super()._apply(device_only(fn, self.buffers(recurse=False)), recurse)


@torch.no_grad()
def use_kernels(model: nn.Module, device_type: str = "cuda") -> dict[str, str]:
    """Let the kernels compute every compressed matrix of `model` that they take, in place.

    Args:
        model: with compressed linears and experts.
        device_type: matrices on such a device are repacked (`cpu` only serves tests: the same layout, slowly).

    Returns:
        Why not, by the path of every compressed linear or experts block that keeps the reference path.
    """
    missing = ""
    if device_type == "cuda":
        fits, reason = decode.supports(torch.device("cuda"), torch.float16)
        missing = "" if fits else reason
    kept = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            reason = missing or _why_not([module], device_type)
            if not reason and module.packed is None:
                module.packed = _repacked([[module]])
        elif isinstance(module, CompressedExperts):
            reason = missing or _why_not_experts(module, device_type)
            if not reason and module.activation is None:
                _pack_experts(module)
        else:
            continue
        if reason:
            kept[path] = reason
    return kept


def gate_activation(experts: CompressedExperts) -> str | None:
    """Which activation the block's own gating is, found by trying it: None if it is none that the kernels have.

    The probe reaches far enough out to tell limits and clamps (gpt-oss) from plain gates.
    """
    gate = torch.linspace(-30, 30, 64).repeat(2, 1)
    up = torch.linspace(40, -40, 64).repeat(2, 1)
    found = experts._apply_gate(torch.cat([gate, up], -1))
    for name in ACTIVATIONS:
        expected = activate(gate, name) * up
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return name
    return None


def _why_not(matrices: Sequence[CompressedMatrix], device_type: str) -> str:
    first = matrices[0]
    if all(matrix.released for matrix in matrices):
        return ""
    if len({(matrix.encoding, matrix.shape) for matrix in matrices}) > 1:
        return "its matrices are written in different ways"
    where = {tensor.device.type for matrix in matrices for tensor in matrix.parameters(recurse=False)}
    if where != {device_type}:
        return f"its weights are on {', '.join(sorted(where))}"
    fits, reason = supports(first.encoding, first.shape)
    if not fits:
        return reason
    members = (m.member(i) for m in matrices for i in range(len(m.ranks)))
    if not all(lossless(member, first.encoding, first.shape[1], TILE) for member in members):
        return "scales too small for fp16"
    return ""


def _why_not_experts(experts: CompressedExperts, device_type: str) -> str:
    if not experts.has_gate:
        return "experts without a gate"
    if experts.has_bias or getattr(experts, "has_post_expert_norm", False):
        return "experts with biases or norms"
    if experts.activation is None and gate_activation(experts) is None:
        return f"the gate of {type(experts).__name__} is none of {', '.join(ACTIVATIONS)}"
    for name, projection in experts.projections.items():
        first = projection.parts[0][0]
        reason = _why_not([matrix for part in projection.parts for matrix in part], device_type)
        if reason:
            return reason
        if first.encoding.planes > 1:
            return f"experts with codes of {first.encoding.bits} bits"
        rows = first.shape[0]
        if name == "gate_up_proj" and len(projection.parts) == 1 and rows % (2 * FACTOR_GROUP):
            return f"gate and up of {rows // 2} rows each in one matrix"
    return ""


def _pack_experts(experts: CompressedExperts) -> None:
    activation = gate_activation(experts)
    experts.packed_gate_up = _repacked(experts.projections["gate_up_proj"].parts, 2)
    experts.packed_down = _repacked(experts.projections["down_proj"].parts, 1)
    experts.activation = activation


def _repacked(stored: Sequence[Sequence[CompressedMatrix]], wanted: int = 1) -> PackedWeight:
    """Repack matrices and let them go.

    Args:
        stored: as `Projection.parts`.
        wanted: parts of the packed matrix. One stored part is cut into as many over its out-features.
    """
    first = stored[0][0]
    cuts, rows = wanted // len(stored), first.shape[0] * len(stored) // wanted
    parts: list[list[dict[str, torch.Tensor]]] = []
    for column in stored:
        members = [matrix.member(i) for matrix in column for i in range(len(matrix.ranks))]
        for cut in range(cuts):
            parts.append([cut_rows(m, first.encoding, cut * rows, (cut + 1) * rows) for m in members])
    packed = PackedWeight(repack(parts, first.encoding, (rows, first.shape[1])))
    for number, column in enumerate(stored):
        expert = 0
        for matrix in column:
            made_of = range(number * cuts, (number + 1) * cuts)
            matrix.release(
                partial(packed.unpack, first=expert, parts=made_of, ranks=matrix.ranks, encoding=matrix.encoding)
            )
            expert += len(matrix.ranks)
    return packed
