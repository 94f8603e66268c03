"""Which vLLM this plugin serves on, and what stands in for it elsewhere.

vLLM's layers and loaders change with every minor version, and most of what a plugin may get wrong is silent. So
versions are listed that the loading tests have passed with, and in others a compressed folder is refused; other models
are none of our business and must not notice.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import vllm
from packaging.version import InvalidVersion, Version
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from milo.errors import ServingError

OLDEST, NEWEST = (0, 26), (0, 33)


def supported(version: str | None = None) -> bool:
    """Whether the loading tests have passed with this version of vLLM (the installed one by default)."""
    try:
        release = Version(version or vllm.__version__).release
    except InvalidVersion:
        return False
    return OLDEST <= (*release, 0)[:2] <= NEWEST


class RefusingConfig(QuantizationConfig):
    """What is registered with a vLLM that was not tested: says so when a compressed folder is opened."""

    def get_name(self) -> str:
        return "milo"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoReturn:
        """Refuse.

        Raises:
            ServingError: always.
        """
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ServingError(
            f"vLLM {vllm.__version__} is not among the versions that this MiLo serves on ({oldest} to {newest}); "
            f"install one of them (pip install 'vllm>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}') or a newer milo-moe"
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return None
