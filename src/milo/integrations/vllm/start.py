"""What both methods do while a model is built: see that it can run at all, and make it run without surprises."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from milo.errors import ServingError
from milo.kernels import decode, prefill
from milo.kernels.layout import PackedMatrix


def check_kernels(device: torch.device, dtype: torch.dtype, experts: int = 1, topk: int = 1) -> None:
    """Refuse a GPU that the kernels do not run on, before a single weight is read.

    Raises:
        ServingError: with the reason.
    """
    if device.type == "cpu":
        return  # the operators' PyTorch path: for tests
    fits, reason = decode.supports(device, dtype, experts, topk)
    if not fits:
        raise ServingError(f"MiLo's kernels do not run here: {reason}; `milo doctor` tells more")


def is_dummy(config: VllmConfig) -> bool:
    """Whether weights are made up instead of loaded (`--load-format dummy`)."""
    return str(config.load_config.load_format) == "dummy"


def prepare(matrix: PackedMatrix, dtype: torch.dtype) -> None:
    """Compile what calls with this matrix may need: later, vLLM captures CUDA graphs, and requests would wait."""
    if matrix.codes.device.type == "cuda":
        decode.prepare(matrix, dtype)
        prefill.prepare(matrix, dtype)
