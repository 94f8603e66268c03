"""An experts block whose projections are compressed.

`CompressedExperts` is mixed in front of whatever experts class a model uses (`class MiloX(CompressedExperts, X)`),
so that gating, activation, biases and norms are inherited from the model and never re-implemented. Only the two
matrix products change hands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from milo import ops
from milo.modules.matrix import CompressedMatrix

if TYPE_CHECKING:
    from milo.modules.packed import PackedWeight


class Projection:
    """The matrices behind one fused parameter: one or more parts, concatenated over out-features (gate, up).

    Args:
        parts: each part is the experts' matrices in order, or a single stack of all of them.

    The matrices are registered elsewhere in the model's tree under their checkpoint names; this is only the view
    from the experts block, and a plain object so that nothing is registered twice.
    """

    def __init__(self, parts: Sequence[Sequence[CompressedMatrix]]) -> None:
        self.parts = [list(part) for part in parts]

    def __call__(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`[T, K]` to `[T, N]` (all parts) for one expert."""
        outputs = [part[0](x, expert) if part[0].stacked else part[expert](x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class CompressedExperts(nn.Module):
    """Mixin: the forward of transformers' experts contract over compressed projections.

    Gating, activation, biases and norms come from the class behind it.
    """

    projections: dict[str, Projection]
    activation: str | None = None  # of the gate, once the weights are in the kernels' layout:
    packed_gate_up: PackedWeight
    packed_down: PackedWeight
    # Of the class behind the mixin:
    num_experts: int
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: `[T, k]`; numbers at or beyond `num_experts` are skipped (expert parallelism).
            top_k_weights: `[T, k]`.

        Returns:
            `[T, H]` in the dtype of `hidden_states`.
        """
        if self.activation is not None:
            first, second = self.packed_gate_up.matrix, self.packed_down.matrix
            return ops.moe_ffn(hidden_states, first, second, top_k_index, top_k_weights, self.activation)
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, choice = torch.where(top_k_index == expert)
            y = self._expert(hidden_states[token], expert)
            output.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(output.dtype))
        return output

    def _expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        hidden = self._project(first, x, expert)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        y = self._project("down_proj", hidden, expert)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _project(self, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
        y = self.projections[name](x, expert)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y


def compress_experts(experts: nn.Module, projections: dict[str, Projection]) -> None:
    """Turn an experts block into a compressed one, in place, by changing its class.

    Args:
        experts: a block that follows the contract, its 3-D parameters already removed.
        projections: by parameter name (`gate_up_proj` or `up_proj`, and `down_proj`).
    """
    owner = type(experts)
    experts.__class__ = type(f"Milo{owner.__name__}", (CompressedExperts, owner), {})
    experts.projections = projections  # type: ignore[assignment]
