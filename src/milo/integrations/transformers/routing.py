"""What routers choose, seen where transformers hands the choice to an experts block (its second argument).

Two uses: counting how many tokens each expert gets on a text, for the frequency policy, and watching which experts each
token goes to, for comparing two models. Experts that are modules of their own are given only their rows, which is
enough to count and not to tell which token went where. Blocks go by their names in the checkpoint, which plans use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from milo.checkpoint.roles import Role
from milo.errors import UnsupportedModelError
from milo.integrations.transformers.memory import inventory_of


def experts_blocks(model: PreTrainedModel) -> dict[str, str]:
    """The blocks whose choices can be watched: checkpoint name (`model.layers.3.mlp.experts`) to module path.

    Args:
        model: an uncompressed causal LM; its compressed self has the blocks at the same paths.

    Raises:
        UnsupportedModelError: the model has experts that MiLo does not understand.
    """
    inventory, placed = inventory_of(model)
    blocks = {}
    for group in inventory.groups:
        placement = placed[group.members[0]]
        if group.role is Role.EXPERT and placement.kind == "experts":
            blocks[group.experts_path] = placement.module
    return blocks


@contextmanager
def watched_choices(model: PreTrainedModel, blocks: Mapping[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a dict that holds, after each forward pass, every block's choices in it: int64 `[tokens, k]`.

    Args:
        model: compressed or not.
        blocks: from `experts_blocks` of the model or of its original.
    """
    latest: dict[str, torch.Tensor] = {}

    def note(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latest[name] = _choices(args, kwargs).detach()

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, path in blocks.items()
    ]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


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


def _choices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[1] if len(args) > 1 else kwargs["top_k_index"]


def _count_choices(tally: torch.Tensor, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    chosen = _choices(args, kwargs).flatten().cpu()
    tally += torch.bincount(chosen[chosen < len(tally)], minlength=len(tally))


def _count_rows(tally: torch.Tensor, expert: int, linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    tally[expert] += args[0][..., 0].numel()
