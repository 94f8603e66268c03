"""Sensitivities from gradients: they predict what a perturbation does, leave the model as it was, and repeat."""

from __future__ import annotations

import pytest
import torch

import zoo
from milo.integrations.transformers import fisher
from milo.integrations.transformers.assembly import sites
from milo.integrations.transformers.fisher import sensitivities
from milo.integrations.transformers.memory import inventory_of
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import Recipe


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "WINDOW", 24)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "gpt_oss", "qwen2_moe"])
def test_every_group_has_one_and_the_model_is_untouched(model_type: str) -> None:
    model = zoo.tiny_model(model_type).eval()
    inventory, _ = inventory_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = sensitivities(model, inventory)
    assert set(found) == {group.name for group in inventory.groups}
    assert all(value > 0 for value in found.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sensitivities(model, inventory) == pytest.approx(found, rel=1e-5)


def test_they_predict_the_divergence_of_small_noise() -> None:
    """KL ≈ s · ρ², for one group at a time, averaged over draws of noise, on the very tokens of the estimate."""
    model = zoo.tiny_model("mixtral").eval()
    inventory, _ = inventory_of(model)
    blank = make_plan(inventory, Recipe("blank"), model.config.to_dict(), Evidence(lambda group: []))
    places = {site.row.name: site for site in sites(model, blank)}
    generator = torch.Generator().manual_seed(0)
    ids = fisher._tokens(model, False, generator)
    # Labels are drawn once a window; many windows' worth of draws make the estimate sharp enough to test.
    estimates = []
    for seed in range(12):
        fisher_generator = torch.Generator().manual_seed(seed)
        totals = dict.fromkeys(places, 0.0)
        with fisher._Gradients(model, list(places.values()), totals):
            for row in ids:
                fisher._backward(model, row, fisher_generator)
        estimates.append({name: total / (2 * ids.numel()) for name, total in totals.items()})
    with torch.no_grad():
        reference = model(ids).logits.double().log_softmax(-1)
        for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.block_sparse_moe.experts.*.w2"):
            predicted = sum(estimate[name] for estimate in estimates) / len(estimates)
            weights = places[name].source(model)
            kept = weights.clone()
            target = model.get_submodule(places[name].placement.module)
            parameter = getattr(target, places[name].placement.parameter).data
            divergences = []
            for _ in range(12):
                noise = (
                    torch.randn(kept.shape, generator=generator)
                    * 0.02
                    * kept.square().mean((1, 2)).sqrt()[:, None, None]
                )
                view = (
                    parameter[None] if places[name].placement.kind == "linear" else places[name].cut(parameter, model)
                )
                view.copy_(kept + noise)
                moved = model(ids).logits.double().log_softmax(-1)
                divergences.append((reference.exp() * (reference - moved)).sum(-1).mean().item())
                view.copy_(kept)
            measured = sum(divergences) / len(divergences)
            assert measured / 0.02**2 == pytest.approx(predicted, rel=0.35), name


def test_own_guesses_replace_the_random_tokens() -> None:
    model = zoo.tiny_model("mixtral").eval()
    random = fisher._tokens(model, False, torch.Generator().manual_seed(0))
    guessed = fisher._tokens(model, True, torch.Generator().manual_seed(0))
    assert random.shape == guessed.shape == (fisher.WINDOWS, 24)
    assert torch.equal(random[:, 0], guessed[:, 0])
    assert not torch.equal(random, guessed)
    assert int(guessed.max()) < model.config.vocab_size
