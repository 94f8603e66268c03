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

from milo.format.matrix import Encoding
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
        self._numbers = matrix.numbers

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix.of([getattr(self, name) for name in _NAMES], self._numbers)

    def unpack(self, expert: int, part: int, rank: int, encoding: Encoding) -> dict[str, torch.Tensor]:
        """The stored tensors of one matrix."""
        return unpack(self.matrix, expert, part, rank, encoding)

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
    if any(matrix.stacked for matrix in matrices):
        return "experts stored as one fused tensor are not repacked yet"
    if len({(matrix.encoding, matrix.shape) for matrix in matrices}) > 1:
        return "its matrices are written in different ways"
    where = {tensor.device.type for matrix in matrices for tensor in matrix.member().values()}
    if where != {device_type}:
        return f"its weights are on {', '.join(sorted(where))}"
    fits, reason = supports(first.encoding, first.shape)
    if fits and not all(lossless(m.member(), m.encoding, m.shape[1], TILE) for m in matrices):
        return "scales too small for fp16"
    return "" if fits else reason


def _why_not_experts(experts: CompressedExperts, device_type: str) -> str:
    parts = {name: projection.parts for name, projection in experts.projections.items()}
    if not experts.has_gate or len(parts.get("gate_up_proj", [])) != 2:
        if experts.has_gate and experts.projections["gate_up_proj"].parts[0][0].stacked:
            return "experts stored as one fused tensor are not repacked yet"
        return "experts without separate gate and up projections"
    if experts.has_bias or getattr(experts, "has_post_expert_norm", False):
        return "experts with biases or norms"
    if experts.activation is None and gate_activation(experts) is None:
        return f"the gate of {type(experts).__name__} is none of {', '.join(ACTIVATIONS)}"
    for projection in parts.values():
        reason = _why_not([matrix for part in projection for matrix in part], device_type)
        if reason:
            return reason
        if projection[0][0].encoding.planes > 1:
            return "experts with codes of 6 or 8 bits"
    return ""


def _pack_experts(experts: CompressedExperts) -> None:
    activation = gate_activation(experts)
    experts.packed_gate_up = _repacked(experts.projections["gate_up_proj"].parts)
    experts.packed_down = _repacked(experts.projections["down_proj"].parts)
    experts.activation = activation


def _repacked(parts: Sequence[Sequence[CompressedMatrix]]) -> PackedWeight:
    first = parts[0][0]
    packed = PackedWeight(repack([[m.member() for m in part] for part in parts], first.encoding, first.shape))
    for number, part in enumerate(parts):
        for expert, matrix in enumerate(part):
            matrix.release(partial(packed.unpack, expert, number, matrix.ranks[0], matrix.encoding))
    return packed
