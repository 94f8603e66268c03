"""A tiny random Mixtral: its figures mean nothing, which is what tests of definitions need."""

from __future__ import annotations

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
