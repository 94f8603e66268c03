"""Writing shards as their tensors are solved.

safetensors' own `save_file` wants a whole shard in memory. Here every tensor's dtype and shape is known before the
first one is computed (the plan is exact), so headers and offsets are written first, the file is allocated in full
(a disk that is too small says so in the first second) and each tensor goes to its place as soon as it exists.

Nothing half-written looks finished: a shard carries a temporary name until its last byte is on disk, and
`config.json`, without which no loader starts, is written last. `UNFINISHED` marks the folder until then.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from milo.checkpoint.source import INDEX, SINGLE
from milo.errors import CheckpointError
from milo.format.matrix import DTYPE_BYTES, TensorSpec

UNFINISHED = "milo_unfinished.json"
EVALUATION = "milo_eval.json"  # what `milo eval --save` measured; nothing but these weights makes it true
_TEMPORARY = ".part"
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


class FolderWriter:
    """Writes the shards of one output folder.

    Args:
        folder: created if needed; must be empty or hold an unfinished run's leftovers, which are removed.
        shards: from `lay_out`.
        overwrite: remove whatever safetensors, index and config the folder holds.

    Raises:
        CheckpointError: the folder holds something else, or the disk is too small.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], overwrite: bool = False) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._shard_of = {name: shard for shard in shards for name in shard.specs}
        self._left = {shard.file: set(shard.specs) for shard in shards}
        self._written: dict[str, int] = {}
        self._open: dict[str, BinaryIO] = {}
        with explained(folder):
            check_output(folder, overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            _clear(folder)
            needed, free = sum(shard.nbytes for shard in shards), shutil.disk_usage(folder).free
            if needed > free:
                raise CheckpointError(
                    f"{folder} needs {needed:,} bytes but its disk has {free:,} free; free some or choose another disk"
                )
            (folder / UNFINISHED).write_text(json.dumps({"shards": [shard.file for shard in shards]}))

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Put a tensor (or consecutive rows of its first dimension) in its place.

        Raises:
            CheckpointError: the disk is full or not writable.
            ValueError: dtype or shape differ from the layout, which would be a bug.
        """
        spec = self._shard_of[name].specs[name]
        if _dtype_name(tensor) != spec.dtype or tuple(tensor.shape[1:]) != spec.shape[1:]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was laid out: {spec}")
        row = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else spec.nbytes
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._put(name, first_row * row, raw)

    def copy(self, name: str, source: Path, begin: int, end: int, chunk: int = 1 << 24) -> None:
        """Put a tensor's bytes `begin .. end` of another file in its place, untouched."""
        with source.open("rb") as stream:
            stream.seek(begin)
            for offset in range(0, end - begin, chunk):
                self._put(name, offset, stream.read(min(chunk, end - begin - offset)))
        if begin == end:
            self._put(name, 0, b"")

    def finish(self, extra: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """Write the index, the extra text files and, last of all, `config.json`.

        Raises:
            CheckpointError: the disk is full or not writable.
            ValueError: tensors are missing, which would be a bug.
        """
        missing = [name for names in self._left.values() for name in names]
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, e.g. {missing[0]}")
        with explained(self.folder):
            if len(self.shards) > 1:
                weight_map = {name: shard.file for name, shard in sorted(self._shard_of.items())}
                total = sum(spec.nbytes for shard in self.shards for spec in shard.specs.values())
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_atomically(self.folder / INDEX, json.dumps(index, indent=1))
            for file, text in extra.items():
                write_atomically(self.folder / file, text)
            write_atomically(self.folder / "config.json", json.dumps(config, indent=2))
            (self.folder / UNFINISHED).unlink()  # not before: without it a second run would refuse the folder

    def close(self) -> None:
        """Close open files; safe to call twice."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def _put(self, name: str, offset: int, data: bytes | memoryview) -> None:
        shard = self._shard_of[name]
        with explained(self.folder):
            stream = self._stream(shard)
            stream.seek(shard.offsets[name] + offset)
            stream.write(data)
            self._written[name] = self._written.get(name, 0) + len(data)
            if self._written[name] < shard.specs[name].nbytes:
                return
            self._left[shard.file].discard(name)
            if not self._left[shard.file]:
                self._complete(shard)

    def _stream(self, shard: Shard) -> BinaryIO:
        if shard.file not in self._open:
            stream = (self.folder / (shard.file + _TEMPORARY)).open("wb+")
            self._open[shard.file] = stream
            if hasattr(os, "posix_fallocate"):  # a full disk shows now, not hours later
                os.posix_fallocate(stream.fileno(), 0, shard.nbytes)
            stream.write(shard.header)
        return self._open[shard.file]

    def _complete(self, shard: Shard) -> None:
        stream = self._open.pop(shard.file)
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        os.replace(self.folder / (shard.file + _TEMPORARY), self.folder / shard.file)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either absent (or old) or complete."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something else than an unfinished run's leftovers.

    Raises:
        CheckpointError: so it does, and `overwrite` does not allow it.
    """
    if overwrite or not folder.exists() or (folder / UNFINISHED).exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another output folder")
    if any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; choose another output folder or pass --overwrite")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".safetensors", _TEMPORARY) or path.name in (INDEX, EVALUATION, "config.json"):
            path.unlink()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the operating system says while `folder` is written into a `CheckpointError` with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"the disk of {folder} is full; free some space and run the command again") from error
        raise CheckpointError(f"cannot write to {folder}: {error}") from error


_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def _dtype_name(tensor: torch.Tensor) -> str:
    return _DTYPE_NAMES[tensor.dtype]
