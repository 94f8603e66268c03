"""The kernels' layout loses nothing: it gives back the same matrix, and the neutral tensors bit for bit."""

import pytest
import torch

from matrices import random_matrix
from milo.format.matrix import Encoding
from milo.kernels import layout, packed_reference, reference
from milo.kernels.unpack import unpack


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (160, 352)])
@pytest.mark.parametrize("parts", [1, 2])
def test_round_trip(bits: int, group_size: int, shape: tuple[int, int], parts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    encoding = Encoding(bits=bits, group_size=group_size)
    ranks = [[0, 17, 8, 1, 40], [0, 8, 33, 0, 3]][:parts]
    matrices = [[random_matrix(shape, r, encoding, generator) for r in row] for row in ranks]
    packed = layout.repack(matrices, encoding, shape)
    for expert in range(5):
        expected = torch.cat([reference.reconstruct(part[expert], encoding, shape) for part in matrices])
        torch.testing.assert_close(packed_reference.dequantize(packed, expert), expected, atol=1e-6, rtol=1e-5)
        for part, members in enumerate(matrices):
            back = unpack(packed, expert, part, ranks[part][expert])
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
    [(Encoding(bits=8), (64, 64)), (Encoding(scale_bits=6), (64, 64)), (Encoding(), (64, 80))],
)
def test_what_does_not_fit_is_refused(encoding: Encoding, shape: tuple[int, int]) -> None:
    fits, reason = layout.supports(encoding, shape)
    assert not fits
    with pytest.raises(ValueError, match="not supported"):
        layout.repack([[{}]], encoding, shape)
    assert "not supported" in reason
