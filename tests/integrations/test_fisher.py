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
    assert set(found.costs) == {group.name for group in inventory.candidates}
    assert all(value > 0 for value in found.costs.values())
    for group in inventory.candidates:
        importance = found.importance[group.name]
        assert importance.shape == (group.count, group.shape[1])
        assert (importance > 0).all()
        torch.testing.assert_close(importance.mean(-1), torch.ones(group.count))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sensitivities(model, inventory).costs == pytest.approx(found.costs, rel=1e-5)


def test_they_predict_the_divergence_of_small_noise() -> None:
    """KL ≈ s · ρ² on the tokens of the estimate, for the last experts: behind them no router can change its mind."""
    model = zoo.tiny_model("mixtral").eval()
    inventory, _ = inventory_of(model)
    blank = make_plan(inventory, Recipe("blank"), model.config.to_dict(), Evidence(lambda group: []))
    places = {site.row.name: site for site in sites(model, blank)}
    predicted = sensitivities(model, inventory).costs
    generator = torch.Generator().manual_seed(0)
    ids = fisher._tokens(model, False, torch.Generator().manual_seed(fisher._SEED))
    with torch.no_grad():
        reference = model(ids).logits.double().log_softmax(-1)
        for leaf in ("w1", "w2", "w3"):
            site = places[f"model.layers.1.block_sparse_moe.experts.*.{leaf}"]
            parameter = getattr(model.get_submodule(site.placement.module), site.placement.parameter).data
            view = site.cut(parameter, model)
            kept = view.clone()
            size = 0.02 * kept.square().mean((1, 2)).sqrt()[:, None, None]
            divergences = []
            for _ in range(4):
                view.copy_(kept + size * torch.randn(kept.shape, generator=generator))
                moved = model(ids).logits.double().log_softmax(-1)
                divergences.append((reference.exp() * (reference - moved)).sum(-1).mean().item())
            view.copy_(kept)
            measured = sum(divergences) / len(divergences) / 0.02**2
            assert measured == pytest.approx(predicted[site.row.name], rel=0.15), leaf


def test_own_guesses_replace_the_random_tokens() -> None:
    model = zoo.tiny_model("mixtral").eval()
    random = fisher._tokens(model, False, torch.Generator().manual_seed(0))
    guessed = fisher._tokens(model, True, torch.Generator().manual_seed(0))
    assert random.shape == guessed.shape == (fisher.WINDOWS, 24)
    assert torch.equal(random[:, 0], guessed[:, 0])
    assert not torch.equal(random, guessed)
    assert int(guessed.max()) < model.config.vocab_size
