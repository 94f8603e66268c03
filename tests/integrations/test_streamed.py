"""Gradients with one layer in memory are those of the whole model, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import GradientCheckpointingLayer

import zoo
from milo.errors import CheckpointError
from milo.integrations.transformers import fisher
from milo.integrations.transformers.fisher import sensitivities
from milo.integrations.transformers.source import open_source
from milo.integrations.transformers.streamed import streamed_model


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "phimoe"])
def test_the_same_to_the_last_bit(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "WINDOW", 24)
    model = zoo.tiny_model(model_type).eval()
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    expected = sensitivities(model, source.inventory, own_text=True)
    with streamed_model(source.checkpoint) as streamed:
        layers = [m for m in streamed.modules() if isinstance(m, GradientCheckpointingLayer)]
        held: list[int] = []
        for layer in layers:  # its first part runs whenever the layer does, also when it is run again
            next(layer.children()).register_forward_hook(lambda *_: held.append(sum(map(_filled, layers))))
        found = sensitivities(streamed, source.inventory, own_text=True)
    assert found.costs == expected.costs
    assert all(torch.equal(found.importance[name], expected.importance[name]) for name in expected.importance)
    assert set(held) == {1}
    assert len(held) == len(layers) * fisher.WINDOWS * (2 + fisher.GUESSES)


def _filled(layer: torch.nn.Module) -> bool:
    return any(parameter.untyped_storage().size() for parameter in layer.parameters())


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    zoo.tiny_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(str(tmp_path))
    with (
        streamed_model(source.checkpoint) as model,
        pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm"),
        torch.no_grad(),
    ):
        model(input_ids=torch.arange(8)[None], use_cache=False)
