"""Compressed matrices of random numbers, for `--load-format dummy`: right in every byte but their meaning."""

from __future__ import annotations

import torch

from milo.format.codes import pack_bytes
from milo.format.matrix import Encoding

_SIZE = 1e-3  # of weights and of factors' elements, as vLLM's own dummy weights


def dummy_matrix(
    encoding: Encoding, shape: tuple[int, int], rank: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors of one matrix by suffix: random codes around the middle of the grid, one scale.

    Args:
        encoding: how they are written.
        shape: `(N, K)`.
        rank: of the compensator; its factors have int3 codes.
        device: where they are made.
    """
    tensors = {}
    for name, spec in encoding.tensors(shape, rank).items():
        if spec.dtype == "I32":  # any bits are a row of codes
            tensors[name] = torch.randint(-(2**31), 2**31, spec.shape, device=device).int()
        elif spec.dtype == "F16":
            value = encoding.max_code / 2 if name == "weight_zero" else _SIZE
            tensors[name] = torch.full(spec.shape, value, dtype=torch.float16, device=device)
        else:
            bits = encoding.scale_bits if name == "weight_scale" else encoding.zero_bits
            code = 2**bits - 1 if name == "weight_scale" else 2**bits // 2
            row = pack_bytes(torch.full((encoding.groups(shape[1]),), code), bits)
            tensors[name] = row.to(device).expand(spec.shape).contiguous()
    return tensors
