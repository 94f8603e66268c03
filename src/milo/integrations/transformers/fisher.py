"""Sensitivities from the model's own gradients, at tokens that nobody wrote.

The KL divergence between a model and the same model with perturbed weights is, to second order, half the quadratic form
of its Fisher information. For noise without a preferred direction only the trace counts, and the trace of a matrix's
block is the mean squared gradient of the log-likelihood of labels *drawn from the model's own distribution*:

    KL  ≈  ½ Σ_m F_m ‖δW_m‖² / numel_m,     F_m = E ‖∂ log p(y|x) / ∂W_m‖²,     y ~ p(·|x)

with the gradient taken over a whole window, since one weight's error is the same at every position. On text this
predicts the measured KL of 3-bit codes within a tenth (docs/log.md). No text is needed, because what the allocator
wants is ratios: uniform random token ids give them well enough, the model's own guesses at what follows them better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from milo.checkpoint.inventory import Inventory
from milo.integrations.transformers.assembly import Site, sites
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import Recipe

WINDOWS = 4
WINDOW = 512
# Times that every token is replaced by the model's guess, all at once. A second time and more changes nothing.
GUESSES = 2
_SEED = 0

Progress = Callable[[float, str], None]


def sensitivities(
    model: PreTrainedModel,
    inventory: Inventory,
    own_text: bool = False,
    progress: Progress = lambda fraction, message: None,
) -> dict[str, float]:
    """Nats of KL divergence a token that each group would cost at a relative squared error of 1.

    Args:
        model: the original, in memory, in a floating dtype; gradients are taken and dropped parameter by parameter.
        inventory: its groups, under checkpoint names.
        own_text: let the model replace the random tokens by its own guesses first.
        progress: called with (fraction, message).

    Raises:
        FormatError: the inventory is of another model.
    """
    blank = make_plan(inventory, Recipe("blank"), model.config.to_dict(), Evidence(lambda group: []))
    places = sites(model, blank)
    generator = torch.Generator().manual_seed(_SEED)
    ids = _tokens(model, own_text, generator)
    totals = dict.fromkeys((site.row.name for site in places), 0.0)
    with _Gradients(model, places, totals):
        for number, row in enumerate(ids):
            progress(number / len(ids), f"sensitivities: window {number + 1} of {len(ids)}")
            _backward(model, row, generator)
    return {name: total / (2 * ids.numel()) for name, total in totals.items()}


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


class _Gradients:
    """While it is entered, every gradient of a compressible parameter is added up as `‖∂W‖² ‖W‖² / numel` and freed."""

    def __init__(self, model: PreTrainedModel, places: Sequence[Site], totals: dict[str, float]) -> None:
        self._model = model
        self._totals = totals
        self._parameters: dict[int, tuple[nn.Parameter, list[Callable[[torch.Tensor], torch.Tensor]], list[str]]] = {}
        for site in places:
            for parameter, cut in _parameters(model, site):
                entry = self._parameters.setdefault(id(parameter), (parameter, [], []))
                entry[1].append(cut)
                entry[2].append(site.row.name)

    def __enter__(self) -> None:
        self._flags = [(p, p.requires_grad) for p in self._model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        self._hooks = []
        for parameter, _, _ in self._parameters.values():
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def _take(self, parameter: torch.Tensor) -> None:
        _, cuts, names = self._parameters[id(parameter)]
        gradient, weight = parameter.grad, parameter.detach()
        parameter.grad = None
        if gradient is None:
            return
        for cut, name in zip(cuts, names, strict=True):
            ours = cut(weight).float().square().mean((-2, -1))
            self._totals[name] += (cut(gradient).float().square().sum((-2, -1)) * ours).sum().item()


def _parameters(
    model: PreTrainedModel, site: Site
) -> list[tuple[nn.Parameter, Callable[[torch.Tensor], torch.Tensor]]]:
    """The parameters behind a site, each with what cuts the site's matrices `[..., N, K]` out of it."""
    if site.placement.kind == "linear":
        return [(model.get_submodule(path).weight, lambda tensor: tensor) for path in site.paths]  # type: ignore[misc]
    parameter = getattr(model.get_submodule(site.placement.module), site.placement.parameter)
    return [(parameter, lambda tensor: site.cut(tensor, model))]
