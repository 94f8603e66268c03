"""Random compressed matrices in the neutral layout, without a solver: every code, scale and zero is arbitrary."""

from __future__ import annotations

import torch

from milo.format.codes import pack_words, word_count
from milo.format.matrix import Encoding
from milo.solve.grid import Grid, grid_tensors, round_scale, round_zero


def random_matrix(
    shape: tuple[int, int], rank: int, encoding: Encoding, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of one matrix; scales and factors are sized so that `y` is about as large as `x`."""
    n, k = shape

    def uniform(*size: int, low: float = 0.5, high: float = 1.5) -> torch.Tensor:
        return torch.empty(size, device=generator.device).uniform_(low, high, generator=generator)

    def words(rows: int, length: int, bits: int) -> torch.Tensor:
        if generator.device.type == "cuda":  # any bit pattern is a row of codes (benchmarks; no padding there)
            size = (rows, word_count(length, bits))
            return torch.randint(-(2**31), 2**31, size, generator=generator, device="cuda").int()
        return pack_words(torch.randint(0, 2**bits, (rows, length), generator=generator), bits)

    groups = encoding.groups(k)
    middle = 2 ** (encoding.bits - 1)
    scale = uniform(n, groups).mul_(0.4 * 2 ** (3 - encoding.bits) / k**0.5)
    zero = uniform(n, groups, low=middle - 1.5, high=middle + 0.5)
    grid = Grid(round_scale(scale, encoding), round_zero(zero, encoding))
    tensors = {"weight_packed": words(n, k, encoding.plane_bits), **grid_tensors(grid, encoding)}
    if encoding.planes == 2:
        tensors["weight_packed_hi"] = words(n, k, encoding.plane_bits)
    if rank:
        for name, length, size in (("lowrank_u", n, 0.4 / rank**0.5), ("lowrank_v", k, 0.4 / k**0.5)):
            sign = torch.randint(0, 2, (rank, -(-length // 64)), generator=generator, device=generator.device) * 2 - 1
            tensors[name] = words(rank, length, 3)
            tensors[name + "_scale"] = (uniform(rank, -(-length // 64)) * sign * size).half()
    return tensors
