"""Layers and routings made up for timing: random codes in the kernels' layout, and tokens' choices of experts.

Every bit pattern is a valid code, so weights need not be quantised to be timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kurtosis import made_up_kurtosis

from milo.checkpoint.inventory import Group, Kind
from milo.checkpoint.roles import Role
from milo.kernels import decode, prefill
from milo.kernels.layout import RANKS, TILE, PackedMatrix
from milo.plan.ranks import Evidence, assign_ranks

Layer = tuple[PackedMatrix, PackedMatrix]  # gate and up, down
ROUTINGS = ("random", "zipf")
ZIPF = 0.65  # exponent: the most chosen of 64 experts then gets 11 times the least, DeepSeek-MoE's 11.7 (paper, §3)
RING_BYTES = 1e8  # of INT3 weights a layer, from which on two layers miss L2


class Shape(NamedTuple):
    """An MoE FFN."""

    hidden: int
    inner: int
    experts: int
    topk: int

    @property
    def ring(self) -> int:
        """Layers that a token's experts in them exceed L2."""
        return 2 if self.hidden * self.inner * self.experts > RING_BYTES else 8


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "deepseek-moe-16b": Shape(2048, 1408, 64, 6),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "tiny": Shape(64, 96, 4, 2),
}


def random_matrix(
    experts: int, n: int, k: int, parts: int, ranks: int | Sequence[int], device: torch.device
) -> PackedMatrix:
    """A stack of 3-bit matrices, groups of 64, with INT3 compensators.

    Args:
        experts: matrices in the stack, each of `parts` parts.
        n: out-features of a part.
        k: in-features.
        parts: 1, or 2 for gate and up.
        ranks: of every expert, or of each.
        device: where it lies.
    """
    rows, tiles = -(-n // (TILE // parts)), -(-k // TILE)
    table, v_first, u_first = [], 0, 0
    for rank in [ranks] * experts if isinstance(ranks, int) else ranks:
        steps = -(-rank // RANKS)
        v_tiles = -(-steps * RANKS * parts // TILE)
        table.append([v_first, v_tiles, u_first, steps])
        v_first, u_first = v_first + v_tiles, u_first + rows * steps

    def words(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)

    def halves(*size: int) -> torch.Tensor:
        return torch.rand(size, device=device).add_(0.5).mul_(0.4 / k**0.5).half()

    def meta(*size: int, zero: float) -> torch.Tensor:
        scale = halves(*size)
        return torch.stack([scale, torch.full_like(scale, zero)], -1)

    return PackedMatrix(
        codes=words(experts, rows, tiles, 3, 32, 4),
        meta=meta(experts, rows, tiles, 8, 8, zero=3.5),
        u_codes=words(u_first, 3, 32),
        u_scales=halves(u_first, parts, RANKS),
        v_codes=words(v_first, tiles, 3, 32, 4),
        v_meta=meta(v_first, tiles, 8, 8, zero=4.0),
        table=torch.tensor(table, dtype=torch.int32, device=device),
        out_features=n,
        in_features=k,
        bits=3,
        group_size=64,
        parts=parts,
        v_row_tiles=max(row[1] for row in table),
    )


def compile_ahead(dtype: torch.dtype, device: torch.device) -> None:
    """Compile all that a model may need of our kernels, side by side, where they run."""
    if decode.supports(device, dtype)[0]:
        experts = random_matrix(2, TILE, TILE, 1, 0, device)  # two, since a single matrix needs fewer
        for kernels in (decode, prefill):
            kernels.prepare(experts, dtype)


def random_layers(shape: Shape, rank: int, device: torch.device) -> list[Layer]:
    """A ring of layers of one rank."""
    return [_layer(shape, rank, rank, device) for _ in range(shape.ring)]


def official_layers(shape: Shape, layers: int, device: torch.device) -> list[Layer]:
    """A Mixtral's layers with the ranks that the official rule (`milo-s2`) gives its experts."""
    groups = [
        Group(f"model.layers.{layer}.block_sparse_moe.experts.*.{leaf}", Role.EXPERT, Kind.EXPERTS, (), shape.experts,
              (shape.hidden, shape.inner) if leaf == "w2" else (shape.inner, shape.hidden), "BF16")
        for layer in range(layers) for leaf in ("w1", "w2", "w3")
    ]  # fmt: skip
    ranks, _ = assign_ranks(groups, "kurtosis2:32", shape.hidden, Evidence(made_up_kurtosis))
    made = []
    for gate, down, up in zip(*(iter(ranks.values()),) * 3, strict=True):
        made.append(_layer(shape, [max(both) for both in zip(gate, up, strict=True)], down, device))
    return made


def _layer(shape: Shape, first: int | Sequence[int], second: int | Sequence[int], device: torch.device) -> Layer:
    return (
        random_matrix(shape.experts, shape.inner, shape.hidden, 2, first, device),
        random_matrix(shape.experts, shape.hidden, shape.inner, 1, second, device),
    )


def route(routing: str, tokens: int, shape: Shape, device: torch.device) -> torch.Tensor:
    """Choices of `tokens` tokens, int64 `[T, k]`.

    `random` is balanced: every set of experts is as likely. `zipf` draws without replacement with probabilities
    that fall as the power `ZIPF` of an expert's place; the places are shuffled.
    """
    scores = -torch.log(torch.empty(tokens, shape.experts, device=device).exponential_())  # Gumbel: the best k are a
    if routing == "zipf":  # sample without replacement of the softmax of what is added to them
        place = torch.randperm(shape.experts, device=device) + 1
        scores -= ZIPF * torch.log(place.float())
    return scores.topk(shape.topk, 1).indices


def expert_bytes(matrix: PackedMatrix) -> torch.Tensor:
    """Bytes that each expert's part of the stack takes, float64 `[E]`."""
    experts, rows = matrix.codes.shape[:2]
    own = (matrix.codes.nbytes + matrix.meta.nbytes + matrix.table.nbytes) / experts
    v = (matrix.v_codes.nbytes + matrix.v_meta.nbytes) / max(1, matrix.v_codes.shape[0])
    u = (matrix.u_codes.nbytes + matrix.u_scales.nbytes) / max(1, matrix.u_codes.shape[0])
    return own + matrix.table[:, 1].double() * v + matrix.table[:, 3].double() * rows * u


def touched_bytes(layers: Sequence[Layer], ids: Sequence[torch.Tensor]) -> float:
    """Mean over the calls of the bytes that one cannot avoid to read: those of the experts that it meets."""
    total = 0.0
    for layer, chosen in zip(layers, ids, strict=True):
        met = chosen.unique()
        total += sum(float(expert_bytes(matrix)[met].sum()) for matrix in layer)
    return total / len(ids)
