"""The kernels' layout loses nothing: it gives back the same matrix, and the neutral tensors bit for bit."""

import pytest
import torch

from matrices import random_matrix
from milo.format.matrix import Encoding
from milo.kernels import layout, packed_reference, reference
from milo.kernels.planes import lossless
from milo.kernels.unpack import unpack

PLAIN = [
    (Encoding(bits, size), shape)
    for bits in (3, 4)
    for size in (32, 64, 128)
    for shape in ((64, 64), (96, 160), (160, 352))
]
COMPACT = [(Encoding(3, 64, 6, 6), (96, 160)), (Encoding(4, 32, 6, 8), (64, 96)), (Encoding(3, 128, 8, 16), (64, 288))]
WIDE = [(Encoding(6, 64), (96, 192)), (Encoding(8, 32, 6, 8), (64, 128)), (Encoding(6, 128, 8, 6), (96, 256))]


@pytest.mark.parametrize(("encoding", "shape"), [*PLAIN, *COMPACT, *WIDE], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_round_trip(encoding: Encoding, shape: tuple[int, int], parts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ranks = [[0, 17, 8, 1, 40], [0, 8, 33, 0, 3]][:parts]
    matrices = [[random_matrix(shape, r, encoding, generator) for r in row] for row in ranks]
    packed = layout.repack(matrices, encoding, shape)
    for expert in range(5):
        expected = torch.cat([reference.reconstruct(part[expert], encoding, shape) for part in matrices])
        # Narrow scales and zeros are rounded to fp16 here, exact products there: 2^-11 of the largest weight each.
        atol = 1e-6 if encoding.scale_bits == 16 else 2.0**-10 * expected.abs().max().item()
        torch.testing.assert_close(packed_reference.dequantize(packed, expert), expected, atol=atol, rtol=1e-5)
        for part, members in enumerate(matrices):
            back = unpack(packed, expert, part, ranks[part][expert], encoding)
            assert back.keys() == members[expert].keys()
            for name, tensor in members[expert].items():
                assert torch.equal(back[name], tensor), name


def test_density() -> None:
    packed = layout.repack(
        [[random_matrix((128, 256), 0, Encoding(), torch.Generator().manual_seed(1))]], Encoding(), (128, 256)
    )
    assert packed.nbytes * 8 == 128 * 256 * 3.5 + packed.table.nbytes * 8


@pytest.mark.parametrize(
    ("encoding", "shape"),
    [(Encoding(bits=5), (64, 64)), (Encoding(bits=8), (64, 96)), (Encoding(), (64, 80))],
)
def test_what_does_not_fit_is_refused(encoding: Encoding, shape: tuple[int, int]) -> None:
    fits, reason = layout.supports(encoding, shape)
    assert not fits
    with pytest.raises(ValueError, match="not supported"):
        layout.repack([[{}]], encoding, shape)
    assert "not supported" in reason


def test_scales_that_fp16_blurs_are_noticed() -> None:
    encoding = Encoding(scale_bits=6)
    tensors = random_matrix((64, 256), 0, encoding, torch.Generator().manual_seed(1))
    assert lossless(tensors, encoding, 256, layout.TILE)
    tensors["weight_super_scale"][5] = 2.0**-20
    assert not lossless(tensors, encoding, 256, layout.TILE)
