"""Sensitivities from the model's own gradients, at tokens that nobody wrote.

The KL divergence between a model and the same model with perturbed weights is, to second order, half the quadratic form
of its Fisher information. For noise without a preferred direction only the trace counts, and the trace of a matrix's
block is the mean squared gradient of the log-likelihood of labels *drawn from the model's own distribution*:

    KL  ≈  ½ Σ_m F_m ‖δW_m‖² / numel_m,     F_m = E ‖∂ log p(y|x) / ∂W_m‖²,     y ~ p(·|x)

with the gradient taken over a whole window, since one weight's error is the same at every position. On text this
predicts the measured KL of 3-bit codes within a tenth (docs/log.md). No text is needed, because what the allocator
wants is ratios: uniform random token ids give them well enough, the model's own guesses at what follows them better.

The same gradients, summed over a matrix's rows only, say which of its in-features errors hurt most: its `importance`.
Between tokens that nobody wrote and real ones the logarithms of these sums correlate by about one half, so that the
best guess at the real ones is the square root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from milo.checkpoint.inventory import Inventory
from milo.integrations.transformers.assembly import Site, sites
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import Recipe
from milo.plan.sensitivity import Sensitivities

WINDOWS = 4
WINDOW = 512
# Times that every token is replaced by the model's guess, all at once. A second time and more changes nothing.
GUESSES = 2
# How far a profile of in-features is believed: the correlation above.
TRUST = 0.5
_LEAST = 1e-3  # of the mean; an in-feature that no gradient reached must not be thrown away
_SEED = 0

Progress = Callable[[float, str], None]


def sensitivities(
    model: PreTrainedModel,
    inventory: Inventory,
    own_text: bool = False,
    progress: Progress = lambda fraction, message: None,
) -> Sensitivities:
    """Nats of KL divergence a token that each group would cost at a relative squared error of 1, and its in-features.

    Args:
        model: the original, in memory, in a floating dtype; gradients are taken and dropped parameter by parameter.
        inventory: its groups, under checkpoint names.
        own_text: let the model replace the random tokens by its own guesses first.
        progress: called with (fraction, message).

    Raises:
        FormatError: the inventory is of another model.
    """
    inventory = replace(inventory, groups=inventory.candidates)
    blank = make_plan(inventory, Recipe("blank"), model.config.to_dict(), Evidence(lambda group: []))
    places = sites(model, blank)
    generator = torch.Generator().manual_seed(_SEED)
    ids = _tokens(model, own_text, generator)
    with _Gradients(model, places) as gradients:
        for number, row in enumerate(ids):
            progress(number / len(ids), f"sensitivities: window {number + 1} of {len(ids)}")
            _backward(model, row, generator)
    return gradients.sensitivities(ids.numel())


def _tokens(model: PreTrainedModel, own_text: bool, generator: torch.Generator) -> torch.Tensor:
    """Token ids `[WINDOWS, T]`."""
    config = model.config.get_text_config()
    length = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    ids = torch.randint(0, config.vocab_size, (WINDOWS, length), generator=generator)
    for _ in range(GUESSES if own_text else 0):
        ids = torch.stack([torch.cat([row[:1], _guess(model, row, generator)[:-1]]) for row in ids])
    return ids


@torch.no_grad()
def _guess(model: PreTrainedModel, row: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0]
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0]


def _backward(model: PreTrainedModel, row: torch.Tensor, generator: torch.Generator) -> None:
    """Gradients of the log-likelihood of drawn labels, summed over the window."""
    with torch.enable_grad():
        logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()


@dataclass
class _Part:
    """What one parameter holds of a site: how it is cut out, and its squared gradients so far."""

    name: str
    cut: Callable[[torch.Tensor], torch.Tensor]  # the site's matrices `[..., N, K]`
    columns: torch.Tensor | None = None  # float32 `[..., K]`, summed over rows

    def take(self, parameter: torch.Tensor, gradient: torch.Tensor) -> float:
        """Add a gradient; returns `‖∂W‖² ‖W‖² / numel` summed over the matrices."""
        size = self.cut(parameter).float().square().mean((-2, -1))
        columns = self.cut(gradient).float().square().sum(-2)
        self.columns = columns if self.columns is None else self.columns + columns
        return (columns.sum(-1) * size).sum().item()


class _Gradients:
    """While it is entered, every gradient of a compressible parameter is added up and freed."""

    def __init__(self, model: PreTrainedModel, places: Sequence[Site]) -> None:
        self._model = model
        self._totals = dict.fromkeys((site.row.name for site in places), 0.0)
        self._parts: dict[str, list[_Part]] = {name: [] for name in self._totals}
        self._parameters: dict[int, tuple[nn.Parameter, list[_Part]]] = {}
        for site in places:
            for parameter, cut in _parameters(model, site):
                part = _Part(site.row.name, cut)
                self._parts[part.name].append(part)
                self._parameters.setdefault(id(parameter), (parameter, []))[1].append(part)

    def __enter__(self) -> Self:
        self._flags = [(p, p.requires_grad) for p in self._model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        self._hooks = []
        for parameter, _ in self._parameters.values():
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def _take(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        if gradient is not None:
            for part in self._parameters[id(parameter)][1]:
                self._totals[part.name] += part.take(parameter.detach(), gradient)

    def sensitivities(self, tokens: int) -> Sensitivities:
        """What the gradients of so many tokens say."""
        importance = {}
        for name, parts in self._parts.items():
            seen = [part.columns.cpu() for part in parts if part.columns is not None]
            if len(seen) == len(parts):
                importance[name] = _importance(torch.cat([columns.view(-1, columns.shape[-1]) for columns in seen]))
        return Sensitivities({name: total / (2 * tokens) for name, total in self._totals.items()}, importance)


def _importance(columns: torch.Tensor) -> torch.Tensor:
    """Weights of in-features from summed squares `[E, K]`; experts that no token reached get the others' mean."""
    profile = columns / columns.mean(-1, keepdim=True)
    unseen = ~profile.isfinite().all(-1)
    profile[unseen] = profile[~unseen].mean(0) if not unseen.all() else 1.0
    profile = profile.clamp(min=_LEAST).pow(TRUST)
    return profile / profile.mean(-1, keepdim=True)


def _parameters(
    model: PreTrainedModel, site: Site
) -> list[tuple[nn.Parameter, Callable[[torch.Tensor], torch.Tensor]]]:
    """The parameters behind a site, each with what cuts the site's matrices `[..., N, K]` out of it."""
    if site.placement.kind == "linear":
        return [(model.get_submodule(path).weight, lambda tensor: tensor) for path in site.paths]  # type: ignore[misc]
    parameter = getattr(model.get_submodule(site.placement.module), site.placement.parameter)
    return [(parameter, lambda tensor: site.cut(tensor, model))]
