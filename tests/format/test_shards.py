"""Shards of a matrix are its numbers, exactly, wherever the cut falls; their products add up to the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import random_matrix
from milo import ops
from milo.format.matrix import Encoding
from milo.format.shards import Span, cut_shard, pad_columns, shard_encoding
from milo.kernels import layout, reference
from milo.solve.stack import solve_stack

ENCODINGS = st.builds(
    Encoding,
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    scale_bits=st.sampled_from([6, 8, 16]),
    zero_bits=st.sampled_from([6, 8, 16]),
)
SIDES = st.sampled_from([64, 96, 224, 352, 448])


def elements(tensors: dict[str, torch.Tensor], encoding: Encoding, k: int) -> list[torch.Tensor]:
    """Code, scale and zero of every weight `[N, K]`, as they are stored."""
    groups = encoding.groups(k)
    meta = [reference.scales(tensors, encoding, groups), reference.zeros(tensors, encoding, groups)]
    spread = [m.repeat_interleave(encoding.group_size, -1)[:, :k] for m in meta]
    return [reference.codes(tensors, encoding, k), *spread]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), encoding=ENCODINGS, n=SIDES, k=SIDES, rank=st.sampled_from([0, 1, 7]))
def test_a_shard_holds_the_numbers_of_the_matrix(
    data: st.DataObject, encoding: Encoding, n: int, k: int, rank: int
) -> None:
    def span(total: int) -> Span:
        begin = data.draw(st.integers(0, total // 32 - 1)) * 32
        return Span(begin, data.draw(st.integers(begin // 32 + 1, total // 32)) * 32, total)

    whole = random_matrix((n, k), rank, encoding, torch.Generator().manual_seed(n + k))
    rows, columns = span(n), span(k)
    shard, written = cut_shard(whole, encoding, rows, columns), shard_encoding(encoding, columns)
    specs = written.tensors((rows.stored, columns.stored), rank)
    assert {name: tuple(t.shape) for name, t in shard.items()} == {name: s.shape for name, s in specs.items()}

    own = slice(rows.lead, None), slice(columns.lead, None)
    there = slice(rows.begin, rows.end), slice(columns.begin, columns.end)
    for found, expected in zip(elements(shard, written, columns.stored), elements(whole, encoding, k), strict=True):
        assert torch.equal(found[own], expected[there])
    for name, length, part, lead in (("lowrank_u", n, rows, rows.lead), ("lowrank_v", k, columns, columns.lead)):
        if rank:
            found, expected = (
                reference.factor(shard, written, name, part.stored),
                reference.factor(whole, encoding, name, length),
            )
            assert found is not None
            assert expected is not None
            assert torch.equal(found[:, lead:], expected[:, part.begin : part.end])
    assert not reference.reconstruct(shard, written, (rows.stored, columns.stored))[: rows.lead].any()


@pytest.mark.parametrize("factor", ["int3", "int8", "fp16"])
def test_every_kind_of_factor_is_cut(factor: str) -> None:
    encoding = Encoding(factor=factor)
    weight = torch.randn(1, 160, 224, generator=torch.Generator().manual_seed(2))
    tensors = solve_stack(weight, [5], encoding, rounds=1)[0].tensors
    whole = reference.reconstruct(tensors, encoding, (160, 224))
    rows, columns = Span(96, 160, 160), Span(96, 224, 224)
    shard = cut_shard(tensors, encoding, rows, columns)
    assert rows.lead == columns.lead == 32
    found = reference.reconstruct(shard, encoding, (rows.stored, columns.stored))
    torch.testing.assert_close(found[32:, 32:], whole[96:, 96:])
    assert not found[:32].any()


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(4, 128, 6, 6), Encoding(6, 32, 6, 8)], ids=str)
@pytest.mark.parametrize("shards", [2, 4])
def test_products_of_the_shards_add_up(encoding: Encoding, shards: int) -> None:
    """Over in-features, in the kernels' layout: 448 in two are 3.5 groups of 64 each, 384 in four are 1.5."""
    n, k = 96, {2: 448, 4: 384}[shards]
    tensors = random_matrix((n, k), 9, encoding, torch.Generator().manual_seed(shards))
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.zeros(5, n, dtype=torch.float64)
    for i in range(shards):
        columns = Span(i * k // shards, (i + 1) * k // shards, k)
        shard, written = cut_shard(tensors, encoding, Span.all(n), columns), shard_encoding(encoding, columns)
        width = columns.stored + -columns.stored % (64 * encoding.planes)
        shard = pad_columns(shard, written, columns.stored, width)
        assert layout.supports(written, (n, width))[0]
        own = torch.zeros(5, width, dtype=torch.float64)
        own[:, columns.lead : columns.stored] = x[:, columns.begin : columns.end]
        y += ops.linear(own, ops.repack([[shard]], written, (n, width)))
    expected = ops.linear(x, ops.repack([[tensors]], encoding, (n, k)))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_experts_add_up_without_any_care(shards: int) -> None:
    """Leading rows of gate and up are zero, so whatever leads the columns of down does not matter."""
    hidden, inner = 96, {2: 448, 4: 384}[shards]
    generator, encoding = torch.Generator().manual_seed(shards), Encoding(scale_bits=6, zero_bits=6)
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    ranks = [[0, 3, 17], [5, 0, 0], [0, 2, 32]]
    stacks = [[random_matrix(s, r, encoding, generator) for r in rs] for s, rs in zip(shapes, ranks, strict=True)]
    x = torch.randn(7, hidden, generator=generator, dtype=torch.float64)
    ids, weights = torch.randint(0, 3, (7, 2), generator=generator), torch.rand(7, 2, generator=generator)

    def ffn(own: Span) -> torch.Tensor:
        out, across = Span.all(hidden), shard_encoding(encoding, own)
        gate, up = ([cut_shard(m, encoding, own, out) for m in stack] for stack in stacks[:2])
        down = [cut_shard(m, encoding, out, own) for m in stacks[2]]
        first = ops.repack([gate, up], encoding, (own.stored, hidden))
        return ops.moe_ffn(x, first, ops.repack([down], across, (hidden, own.stored)), ids, weights)

    parts = [ffn(Span(i * inner // shards, (i + 1) * inner // shards, inner)) for i in range(shards)]
    torch.testing.assert_close(torch.stack(parts).sum(0), ffn(Span.all(inner)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(6, 32, 6, 8), Encoding(3, 128, 8, 6)], ids=str)
def test_padding_leaves_the_weights_alone(encoding: Encoding) -> None:
    tensors = random_matrix((64, 96), 3, encoding, torch.Generator().manual_seed(5))
    wide = pad_columns(tensors, encoding, 96, 256)
    assert {name: tuple(t.shape) for name, t in wide.items()} == {
        name: spec.shape for name, spec in encoding.tensors((64, 256), 3).items()
    }
    found = reference.reconstruct(wide, encoding, (64, 256))[:, :96]
    torch.testing.assert_close(found, reference.reconstruct(tensors, encoding, (64, 96)))


@pytest.mark.parametrize(("begin", "end"), [(16, 64), (0, 80), (64, 64), (96, 224)])
def test_cuts_inside_a_block_are_refused(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match="whole blocks of 32"):
        Span(begin, end, 200)
