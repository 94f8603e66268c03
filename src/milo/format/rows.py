"""Cutting a stored matrix over its out-features, and putting the pieces together again, without decoding anything.

Every tensor of the weights has a row an out-feature. Of the compensator only `Uᵀ [r, N]` does, packed along N in blocks
of 32 codes under a scale every 64: so a cut falls on a multiple of 64. V belongs to every piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from milo.format.codes import BLOCK
from milo.format.matrix import FACTOR_BITS, FACTOR_GROUP, Encoding

Tensors = Mapping[str, torch.Tensor]


def cut_rows(tensors: Tensors, encoding: Encoding, begin: int, end: int) -> dict[str, torch.Tensor]:
    """Out-features `begin .. end` of one matrix (views).

    Args:
        tensors: of one matrix, by suffix.
        encoding: how they are written.
        begin: a multiple of 64 if there is a compensator.
        end: likewise, or the number of out-features.

    Raises:
        ValueError: a cut inside a group of U.
    """
    if "lowrank_u" in tensors and (
        begin % FACTOR_GROUP or (end % FACTOR_GROUP and end != len(tensors["weight_scale"]))
    ):
        raise ValueError(f"rows {begin} to {end} cut a group of {FACTOR_GROUP} of U")
    piece = {name: t[begin:end] for name, t in tensors.items() if name.startswith("weight")}
    if "lowrank_u" in tensors:
        bits = FACTOR_BITS[encoding.factor]
        # Elements of Uᵀ's second dimension: numbers themselves, or `bits` words for every block of 32 codes.
        first, last = (begin, end) if bits == 16 else (begin // BLOCK * bits, -(-end // BLOCK) * bits)
        piece["lowrank_u"] = tensors["lowrank_u"][:, first:last]
        if bits < 16:
            groups = slice(begin // FACTOR_GROUP, -(-end // FACTOR_GROUP))
            piece["lowrank_u_scale"] = tensors["lowrank_u_scale"][:, groups]
        piece |= {name: t for name, t in tensors.items() if name.startswith("lowrank_v")}
    return piece


def join_rows(pieces: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Inverse of `cut_rows` over consecutive pieces, which share V."""
    first = pieces[0]
    joined = {}
    for name, tensor in first.items():
        if name.startswith("lowrank_v"):
            joined[name] = tensor
        else:
            joined[name] = torch.cat([piece[name] for piece in pieces], 1 if name.startswith("lowrank_u") else 0)
    return joined
