"""What vLLM asks every quantisation config, whether it serves or refuses."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from milo.checkpoint.compressed import QUANT_METHOD


class BaseConfig(QuantizationConfig):
    """The method's name and what it needs; how layers are served is a subclass's."""

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
