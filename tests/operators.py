"""What tests of the operators share: random experts, packed and dense in float64, and how results are judged.

Bounds, relative to the reference: over the whole; for every row (token) and column (out-feature) of at least 16, twice
that; for the worst element, |Δ| over the largest magnitude of the reference.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from matrices import random_matrix
from milo import ops
from milo.format.matrix import Encoding
from milo.kernels import reference

NORM = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
WORST = 8  # the worst element's bound, as a multiple of the bound by norm: rounding to 16 bits alone reaches 4
DTYPES = [torch.float16, torch.bfloat16]
# Compact metadata, and codes of two planes.
COMPACT = [Encoding(3, 64, 6, 6), Encoding(4, 32, 6, 8), Encoding(6, 64, 6, 8), Encoding(8, 32, 6, 8), Encoding(6, 128)]
RANKS = [0, 1, 8, 17, 32, 0, 33, 16]


def check(y: torch.Tensor, expected: torch.Tensor) -> None:
    y, expected, bound = y.double().cpu(), expected.cpu(), NORM[y.dtype]
    assert y.shape == expected.shape
    assert not y.isnan().any()
    delta, size = y - expected, expected.norm() / expected.numel() ** 0.5
    assert delta.norm() <= bound * expected.norm()
    for dim in (0, 1):
        if expected.shape[dim] < 16:
            continue  # a norm over so few is judged as single elements are
        typical = size * expected.shape[dim] ** 0.5
        assert (delta.norm(dim=dim) <= 2 * bound * expected.norm(dim=dim).clamp(min=typical)).all()
    assert delta.abs().max() <= WORST * bound * expected.abs().max().clamp(min=size)


def dense(matrix: dict[str, torch.Tensor], encoding: Encoding, shape: tuple[int, int]) -> torch.Tensor:
    """`Ŵ` in float64, from the neutral layout."""
    weight = reference.dequantize(matrix, encoding, shape[1]).double()
    u = reference.factor(matrix, encoding, "lowrank_u", shape[0])
    v = reference.factor(matrix, encoding, "lowrank_v", shape[1])
    return weight if u is None or v is None else weight + u.double().T @ v.double()


def experts_of(
    shape: tuple[int, int], ranks: list[int], encoding: Encoding, seed: int
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    matrices = [random_matrix(shape, rank, encoding, generator) for rank in ranks]
    return matrices, [dense(m, encoding, shape) for m in matrices]


class Block:
    """An MoE FFN with random weights: packed on a device, and dense in float64."""

    def __init__(
        self, hidden: int, inner: int, ranks: list[list[int]], encoding: Encoding, seed: int = 0, device: str = "cuda"
    ) -> None:
        shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
        made = [experts_of(s, r, encoding, seed + i) for i, (s, r) in enumerate(zip(shapes, ranks, strict=True))]
        there = [[{n: t.to(device) for n, t in m.items()} for m in matrices] for matrices, _ in made]
        self.gate_up = ops.repack(there[:2], encoding, shapes[0])
        self.down = ops.repack(there[2:], encoding, shapes[2])
        self.weights = [w for _, w in made]

    def expected(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activation: str = "silu"
    ) -> torch.Tensor:
        x, ids, weights = x.double().cpu(), ids.cpu(), weights.double().cpu()
        act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}[activation]
        out = torch.zeros_like(x)
        for expert, (gate, up, down) in enumerate(zip(*self.weights, strict=True)):
            token, choice = torch.where(ids == expert)
            h = act(x[token] @ gate.T) * (x[token] @ up.T)
            out.index_add_(0, token, h @ down.T * weights[token, choice, None])
        return out


def route(
    tokens: int, experts: int, topk: int, seed: int = 0, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    weights, ids = torch.rand(tokens, experts).softmax(-1).topk(topk)
    return ids.to(device), weights.to(device)


def stacked(
    encoding: Encoding, ranks: tuple[int, ...], device: str = "cuda"
) -> tuple[ops.PackedMatrix, list[ops.PackedMatrix], torch.Tensor]:
    """Matrices of 192, 64 and 96 out-features as one, alone, and all of them dense in float64."""
    rows, columns = (192, 64, 96), 1152
    made = [experts_of((n, columns), [rank], encoding, n) for n, rank in zip(rows, ranks, strict=True)]
    there = [{n: t.to(device) for n, t in matrix.items()} for (matrix,), _ in made]
    alone = [ops.repack([[matrix]], encoding, (n, columns)) for n, matrix in zip(rows, there, strict=True)]
    return ops.stack(alone), alone, torch.cat([weight for _, (weight,) in made])
