"""A matrix cut over its out-features is the same matrix."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from matrices import random_matrix
from milo.format.matrix import Encoding
from milo.format.rows import cut_rows, join_rows
from milo.kernels.reference import reconstruct
from milo.solve.stack import solve_stack

ENCODINGS = [Encoding(), Encoding(6, 32, 6, 8), Encoding(factor="int8"), Encoding(4, 128, 8, 6, "fp16")]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("cuts", [(0, 64, 160), (0, 128, 160), (0, 64, 128, 160)])
def test_pieces_are_the_rows_and_join_to_the_whole(encoding: Encoding, rank: int, cuts: tuple[int, ...]) -> None:
    weight = torch.randn(1, 160, 96, generator=torch.Generator().manual_seed(2))
    tensors = solve_stack(weight, [rank], encoding, rounds=1)[0].tensors
    whole = reconstruct(tensors, encoding, (160, 96))
    pieces = []
    for begin, end in pairwise(cuts):
        pieces.append(cut_rows(tensors, encoding, begin, end))
        torch.testing.assert_close(reconstruct(pieces[-1], encoding, (end - begin, 96)), whole[begin:end])
    joined = join_rows(pieces)
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensors[name]) for name in tensors)


def test_a_cut_inside_a_group_of_u_is_refused() -> None:
    tensors = random_matrix((160, 64), 3, Encoding(), torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="a group of 64"):
        cut_rows(tensors, Encoding(), 0, 96)
    assert cut_rows(tensors, Encoding(), 64, 160)["lowrank_u_scale"].shape == (3, 2)
