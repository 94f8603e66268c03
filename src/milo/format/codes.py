"""Packing small integers into words with no wasted bit.

A row of `n` codes of `b` bits is one little-endian bit stream: code `i` occupies bits `b*i .. b*i + b - 1`, bit 0
being the lowest bit of the first byte. Rows of weights and factors are padded with zero codes to a multiple of 32
codes, so that 32 codes fill exactly `b` 32-bit words (three words for 3 bits: 3.0 bits a weight, not 3.2). Group
metadata is padded to whole bytes only.

Eight codes of `b` bits fill exactly `b` bytes, which is the unit both directions work in.
"""

from __future__ import annotations

import torch

BLOCK = 32  # codes a block: the smallest count that fills whole 32-bit words for every width


def word_count(n: int, bits: int) -> int:
    """Number of 32-bit words that hold one row of `n` codes of `bits` bits."""
    return -(-n // BLOCK) * bits


def byte_count(n: int, bits: int) -> int:
    """Number of bytes that hold one row of `n` codes of `bits` bits of group metadata."""
    return -(-n * bits // 8)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of codes into 32-bit words.

    Args:
        codes: integers in `[0, 2**bits)`, shape `[..., n]`, any integer dtype.
        bits: width of a code, 1 to 8.

    Returns:
        int32 tensor `[..., word_count(n, bits)]`, on the same device.

    Raises:
        ValueError: if `bits` is out of range.
    """
    n = codes.shape[-1]
    packed = _pack_bytes(codes, bits, padded=-(-n // BLOCK) * BLOCK)
    return packed.contiguous().view(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Inverse of `pack_words`.

    Args:
        words: int32 `[..., word_count(n, bits)]`.
        bits: width of a code, 1 to 8.
        n: codes a row.

    Returns:
        uint8 tensor `[..., n]`.

    Raises:
        ValueError: if the last dimension is not `word_count(n, bits)`.
    """
    if words.shape[-1] != word_count(n, bits):
        raise ValueError(f"{n} codes of {bits} bits need {word_count(n, bits)} words, got {words.shape[-1]}")
    return _unpack_bytes(words.contiguous().view(torch.uint8), bits, n)


def pack_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of group metadata into bytes: `[..., n]` to uint8 `[..., byte_count(n, bits)]`."""
    n = codes.shape[-1]
    packed = _pack_bytes(codes, bits, padded=-(-n // 8) * 8)
    return packed[..., : byte_count(n, bits)].contiguous()


def unpack_bytes(data: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Inverse of `pack_bytes`: uint8 `[..., byte_count(n, bits)]` to uint8 codes `[..., n]`."""
    if data.shape[-1] != byte_count(n, bits):
        raise ValueError(f"{n} codes of {bits} bits need {byte_count(n, bits)} bytes, got {data.shape[-1]}")
    missing = -(-n // 8) * bits - data.shape[-1]
    return _unpack_bytes(torch.nn.functional.pad(data, (0, missing)), bits, n)


def _pack_bytes(codes: torch.Tensor, bits: int, padded: int) -> torch.Tensor:
    _check_bits(bits)
    wide = torch.int32 if bits <= 3 else torch.int64  # eight codes must fit below the sign bit
    codes = torch.nn.functional.pad(codes, (0, padded - codes.shape[-1]))
    octets = codes.reshape(*codes.shape[:-1], padded // 8, 8).to(wide)
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device, dtype=wide)
    # The fields do not overlap, so their sum is their union (for 8 bits it wraps into the sign bit, as it should).
    stream = (octets << shifts).sum(-1, dtype=wide)
    byte_shifts = torch.arange(0, 8 * bits, 8, device=codes.device, dtype=wide)
    return ((stream[..., None] >> byte_shifts) & 0xFF).to(torch.uint8).flatten(-2)


def _unpack_bytes(data: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    _check_bits(bits)
    if bits == 8:
        return data[..., :n]
    wide = torch.int32 if bits <= 3 else torch.int64
    groups = data.reshape(*data.shape[:-1], data.shape[-1] // bits, bits).to(wide)
    byte_shifts = torch.arange(0, 8 * bits, 8, device=data.device, dtype=wide)
    stream = (groups << byte_shifts).sum(-1, dtype=wide)
    shifts = torch.arange(0, 8 * bits, bits, device=data.device, dtype=wide)
    codes = ((stream[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :n]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
