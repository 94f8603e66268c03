"""Two random models and a text.

Helpers are modules next to the test folders: `evaluate` as a package name belongs to a library that lm-eval needs.
"""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralForCausalLM

from judged import VOCABULARY, tiny_mixtral


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
