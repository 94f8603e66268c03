"""What stands in for the plugin in a vLLM that it was not tested with.

A compressed folder is refused when it is opened; other models are none of our business and must not notice.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import vllm
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from milo.errors import ServingError
from milo.integrations.vllm.base import BaseConfig
from milo.integrations.vllm.versions import RANGE


class RefusingConfig(BaseConfig):
    """What is registered with a vLLM that was not tested: says so when a compressed folder is opened."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoReturn:
        """Refuse.

        Raises:
            ServingError: always.
        """
        raise ServingError(
            f"vLLM {vllm.__version__} is not among the versions that this MiLo serves on ({RANGE}): "
            "pip install 'milo-moe[vllm]', or a newer milo-moe"
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return None
