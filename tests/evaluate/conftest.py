"""A tiny random Mixtral: its figures mean nothing, which is what tests of definitions need."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

VOCABULARY = 97


def tiny_mixtral(seed: int, **overrides: object) -> MixtralForCausalLM:
    """A two-layer Mixtral with weights large enough for its predictions to differ from uniform."""
    config = MixtralConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            **overrides,
        }
    )
    torch.manual_seed(seed)
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model() -> MixtralForCausalLM:
    return tiny_mixtral(0)


@pytest.fixture(scope="session")
def other() -> MixtralForCausalLM:
    return tiny_mixtral(1)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """150 tokens: with a window of 32, four whole windows and one of 22."""
    return torch.randint(VOCABULARY, (150,), generator=torch.Generator().manual_seed(2))
