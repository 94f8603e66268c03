"""Bit packing, pinned against Python's own integers: a row of codes is one little-endian bit stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milo.format.codes import byte_count, pack_bytes, pack_words, unpack_bytes, unpack_words


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.integers(1, 8))
    length = draw(st.integers(1, 150))
    count = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    codes = draw(st.lists(row, min_size=count, max_size=count))
    return bits, torch.tensor(codes, dtype=torch.uint8).reshape(count, length)


def stream(codes: list[int], bits: int, size: int) -> bytes:
    """The bit stream of one row, built as one big integer."""
    return sum(code << (bits * i) for i, code in enumerate(codes)).to_bytes(size, "little")


@given(rows_of_codes())
def test_words_hold_the_stream_padded_to_blocks_of_32_and_come_back(
    case: tuple[int, torch.Tensor],
) -> None:
    bits, codes = case
    words = pack_words(codes, bits)
    blocks = (codes.shape[1] + 31) // 32
    assert words.dtype == torch.int32
    assert words.shape == (len(codes), blocks * bits)
    for row, packed in zip(codes.tolist(), words, strict=True):
        assert packed.numpy().tobytes() == stream(row, bits, blocks * bits * 4)
    assert torch.equal(unpack_words(words, bits, codes.shape[1]), codes)


@given(rows_of_codes())
def test_bytes_hold_the_stream_padded_to_whole_bytes_and_come_back(
    case: tuple[int, torch.Tensor],
) -> None:
    bits, codes = case
    data = pack_bytes(codes, bits)
    size = (codes.shape[1] * bits + 7) // 8
    assert data.dtype == torch.uint8
    assert data.shape == (len(codes), size)
    assert byte_count(codes.shape[1], bits) == size
    for row, packed in zip(codes.tolist(), data, strict=True):
        assert packed.numpy().tobytes() == stream(row, bits, size)
    assert torch.equal(unpack_bytes(data, bits, codes.shape[1]), codes)


def test_32_codes_of_3_bits_are_exactly_three_words_and_code_i_stands_at_bit_3i() -> None:
    for position in range(32):
        codes = torch.zeros(32, dtype=torch.uint8)
        codes[position] = 7
        words = pack_words(codes, 3)
        assert words.shape == (3,)
        value = int.from_bytes(words.numpy().tobytes(), "little")
        assert value == 7 << (3 * position)


def test_the_example_of_the_documentation() -> None:
    words = pack_words(torch.arange(32) % 8, 3)
    assert words.numpy().tobytes() == bytes.fromhex("88C6FA" * 4)


def test_leading_dimensions_and_any_integer_dtype_are_kept_apart_from_the_codes() -> None:
    codes = torch.arange(2 * 3 * 40).reshape(2, 3, 40) % 8
    words = pack_words(codes, 3)
    assert words.shape == (2, 3, 6)
    assert torch.equal(unpack_words(words, 3, 40).long(), codes)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(pack_words(codes.to(dtype), 3), words)


def test_non_contiguous_codes_pack_like_their_copy() -> None:
    codes = torch.randint(0, 8, (40, 5), generator=torch.Generator().manual_seed(0)).mT
    assert torch.equal(pack_words(codes, 3), pack_words(codes.contiguous(), 3))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_a_width_outside_1_to_8_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack_words(torch.zeros(32, dtype=torch.uint8), bits)


def test_unpacking_the_wrong_number_of_words_or_bytes_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="need 6 words, got 5"):
        unpack_words(torch.zeros(5, dtype=torch.int32), 3, 33)
    with pytest.raises(ValueError, match="need 5 bytes, got 4"):
        unpack_bytes(torch.zeros(4, dtype=torch.uint8), 6, 6)
