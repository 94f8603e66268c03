"""Routing counts: how many tokens each expert gets on a text, for the frequency policy.

The counts are taken where transformers hands the router's choice to an experts block (its second argument), or, for
experts that are modules of their own, from the number of rows each one receives. They are stored under the names of
the checkpoint, which plans use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from milo.checkpoint.roles import Role
from milo.errors import UnsupportedModelError
from milo.integrations.transformers.memory import inventory_of


@torch.no_grad()
def routing_counts(
    model: PreTrainedModel,
    ids: torch.Tensor,
    window: int = 512,
    progress: Callable[[float, str], None] = lambda fraction, message: None,
) -> dict[str, list[int]]:
    """Tokens routed to each expert.

    Args:
        model: an uncompressed causal LM.
        ids: int64 `[T]`.
        window: tokens a forward pass.
        progress: called with the fraction done.

    Returns:
        By experts block (`model.layers.3.mlp.experts`, checkpoint names), one count an expert.

    Raises:
        UnsupportedModelError: the model has no experts that MiLo understands.
    """
    counts: dict[str, torch.Tensor] = {}
    hooks = []
    inventory, placed = inventory_of(model)
    for group in inventory.groups:
        if group.role is not Role.EXPERT or group.experts_path in counts:
            continue
        counts[group.experts_path] = tally = torch.zeros(group.count, dtype=torch.int64)
        placement = placed[group.members[0]]
        if placement.kind == "experts":
            block = model.get_submodule(placement.module)
            hooks.append(block.register_forward_pre_hook(partial(_count_choices, tally), with_kwargs=True))
            continue
        for expert, member in enumerate(group.members):
            linear = model.get_submodule(placed[member].module)
            hooks.append(linear.register_forward_pre_hook(partial(_count_rows, tally, expert)))
    if not counts:
        raise UnsupportedModelError(f"{type(model).__name__} has no experts to count")
    try:
        for start in range(0, len(ids), window):
            model(ids[start : start + window][None].to(model.device), use_cache=False)
            progress(min(1.0, (start + window) / len(ids)), f"{min(start + window, len(ids)):,} tokens")
    finally:
        for hook in hooks:
            hook.remove()
    return {path: tally.tolist() for path, tally in counts.items()}


def _count_choices(tally: torch.Tensor, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
    chosen = chosen.flatten().cpu()
    tally += torch.bincount(chosen[chosen < len(tally)], minlength=len(tally))


def _count_rows(tally: torch.Tensor, expert: int, linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    tally[expert] += args[0][..., 0].numel()
