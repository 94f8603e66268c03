"""Where every tensor of an output folder goes, decided before the first one is computed.

safetensors' own `save_file` wants a whole shard in memory. Here dtypes and shapes are known beforehand (the plan is
exact), so every shard's header and every tensor's file offset are too: tensors may be written in any order, by any
process, straight to their place.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milo.checkpoint.source import SINGLE
from milo.format.matrix import DTYPE_BYTES, TensorSpec

Unit = Sequence[tuple[str, TensorSpec]]  # tensors that must share a shard: those of one matrix


@dataclass(frozen=True)
class Shard:
    """One output file: its header bytes, and the file offset of every tensor."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    specs: Mapping[str, TensorSpec]
    nbytes: int


def lay_out(units: Iterable[Unit], max_shard_size: int, metadata: Mapping[str, str]) -> list[Shard]:
    """Distribute tensors over shards, in order, the tensors of a unit together.

    Args:
        units: groups of (name, spec).
        max_shard_size: bytes of tensor data a shard may hold; a larger unit gets a shard of its own.
        metadata: free-form strings for every header (`format: pt` is added, which loaders ask for).
    """
    filled: list[list[tuple[str, TensorSpec]]] = [[]]
    size = 0
    for unit in units:
        nbytes = sum(spec.nbytes for _, spec in unit)
        if filled[-1] and size + nbytes > max_shard_size:
            filled.append([])
            size = 0
        filled[-1].extend(unit)
        size += nbytes
    count = len(filled)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [_shard(name, tensors, metadata) for name, tensors in zip(names, filled, strict=True)]


def _shard(file: str, tensors: Unit, metadata: Mapping[str, str]) -> Shard:
    # Wide elements first, as safetensors itself orders them: then every tensor is aligned without padding.
    ordered = sorted(tensors, key=lambda item: -DTYPE_BYTES[item[1].dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, spec in ordered:
        end = position + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = {name: len(header) + entries[name]["data_offsets"][0] for name, _ in ordered}
    return Shard(file, header, offsets, dict(ordered), len(header) + position)
