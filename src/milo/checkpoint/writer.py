"""Writing an output folder whose layout is known: tensors to their places, shards to their names, config last.

Two roles. A `TensorWriter` puts bytes at their offsets; it holds no state, so every thread, process or machine that
solves matrices has one. The `FolderWriter` belongs to the one process that runs the compression: it allocates the
files in full (a disk that is too small says so in the first second), keeps count of what has been written, and gives
a shard its name when its last byte is on disk.

Nothing half-written looks finished: a shard carries a temporary name until then, `config.json`, without which no
loader starts, is written last, and the journal (`UNFINISHED`) lies in the folder until that is done.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from milo.checkpoint.layout import Shard
from milo.checkpoint.source import INDEX, TORCH_DTYPES
from milo.errors import CheckpointError

UNFINISHED = "milo_journal.jsonl"  # see milo.pipeline.journal
EVALUATION = "milo_eval.json"  # what `milo eval --save` measured; nothing but these weights makes it true
_TEMPORARY = ".part"
_CHUNK = 1 << 24
# From so many bytes on the system is told to begin writing to the disk at once; else it would wait until the shard is
# flushed, and the disk would stand idle while matrices are solved.
_HASTY = 1 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TensorWriter:
    """Puts tensors at their offsets in the shards of `folder`, which must have been allocated.

    Args:
        folder: the output.
        shards: from `lay_out`.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.shard_of = {name: shard for shard in shards for name in shard.specs}

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> memoryview:
        """Put a tensor (or consecutive rows of its first dimension) in its place.

        Returns:
            The bytes that were written.

        Raises:
            CheckpointError: the disk is full or not writable.
            ValueError: dtype or shape differ from the layout, which would be a bug.
        """
        spec = self.shard_of[name].specs[name]
        rows = tensor.shape[0] if tensor.ndim else 0
        if (
            _DTYPE_NAMES[tensor.dtype] != spec.dtype
            or tuple(tensor.shape[1:]) != spec.shape[1:]
            or (spec.shape and first_row + rows > spec.shape[0])
        ):
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was laid out: {spec}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if not data:
            return data
        with self._opened(name) as file:
            self._put(file, data, self.shard_of[name].offsets[name] + first_row * spec.row_bytes)
        return data

    def copy(self, name: str, source: Path, begin: int, end: int) -> Iterator[bytes]:
        """Put a tensor's bytes `begin .. end` of another file in its place, and yield them chunk by chunk."""
        offset = self.shard_of[name].offsets[name]
        if begin == end:
            return
        with self._opened(name) as file:
            for data in _chunks(source, begin, end):
                self._put(file, memoryview(data), offset)
                offset += len(data)
                yield data

    def stored(self, name: str, first_row: int, nbytes: int) -> Iterator[bytes]:
        """What is on disk of a tensor, chunk by chunk; less than `nbytes` where the file ends or is missing."""
        shard = self.shard_of[name]
        path = self.folder / shard.file
        path = path if path.exists() else temporary(path)
        if not path.exists():
            return
        with path.open("rb") as stream:
            stream.seek(shard.offsets[name] + first_row * shard.specs[name].row_bytes)
            while nbytes and (data := stream.read(min(_CHUNK, nbytes))):
                nbytes -= len(data)
                yield data

    def _put(self, file: int, data: memoryview, offset: int) -> None:
        begin, nbytes = offset, len(data)
        while data:
            done = os.pwrite(file, data, offset)
            data, offset = data[done:], offset + done
        if nbytes >= _HASTY and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, begin, nbytes, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        # Write-only, one file a call: on network disks a page that was never read is never written back whole, and
        # what was written is there for the other machines once the file is closed.
        with explained(self.folder):
            file = os.open(temporary(self.folder / self.shard_of[name].file), os.O_WRONLY)
            try:
                yield file
            finally:
                os.close(file)


class FolderWriter:
    """Allocates, counts and names the shards of one output folder.

    Args:
        folder: the output; made if needed.
        shards: from `lay_out`.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.shards = list(shards)
        self.place = TensorWriter(folder, shards)
        self._left = {shard.file: sum(spec.nbytes for spec in shard.specs.values()) for shard in shards}

    def check_space(self, keep: bool) -> None:
        """Compare what is still to be allocated with the disk's free bytes.

        Args:
            keep: shards that lie in the folder stay; else they will be removed and their room counts as free.

        Raises:
            CheckpointError: the disk is too small.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            needed, free = sum(shard.nbytes for shard in self.shards), shutil.disk_usage(self.folder).free
            held = sum(path.stat().st_blocks * 512 for path in self._weights())
        if keep:
            needed = max(0, needed - held)
        else:
            free += held
        if needed > free:
            raise CheckpointError(
                f"{self.folder} needs {needed:,} bytes but its disk has {free:,} free; free some or choose another disk"
            )

    def clear(self, keep: bool) -> None:
        """Remove config, index and evaluation, and the shards of other layouts (with `keep` false all of them)."""
        ours = {shard.file for shard in self.shards} if keep else set()
        with explained(self.folder):
            for path in self._weights():
                if path.name.removesuffix(_TEMPORARY) not in ours:
                    path.unlink()
            for name in (INDEX, EVALUATION, "config.json"):
                (self.folder / name).unlink(missing_ok=True)
            for shard in self.shards:  # a finished shard that is not what the layout says is no longer finished
                path = self.folder / shard.file
                if path.exists() and not _is_whole(path, shard):
                    os.replace(path, temporary(path))

    def count(self, name: str, nbytes: int) -> Shard | None:
        """Note that bytes of a tensor are in place; returns its shard if it has nothing left to write."""
        shard = self.place.shard_of[name]
        self._left[shard.file] -= nbytes
        return shard if self._left[shard.file] == 0 else None

    def allocate(self) -> None:
        """Give every unfinished shard its full size and its header, keeping what it holds.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        with explained(self.folder):
            for shard in self.shards:
                path = self.folder / shard.file
                if path.exists():
                    if self._left[shard.file] == 0:
                        continue
                    os.replace(path, temporary(path))
                file = os.open(temporary(path), os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    if os.fstat(file).st_size > shard.nbytes or not hasattr(os, "posix_fallocate"):
                        os.ftruncate(file, shard.nbytes)
                    if hasattr(os, "posix_fallocate"):  # a full disk shows now, not hours later
                        os.posix_fallocate(file, 0, shard.nbytes)
                    os.pwrite(file, shard.header, 0)
                finally:
                    os.close(file)

    def complete(self, shard: Shard) -> None:
        """Flush a shard that has been written to the disk, and give it its name."""
        path = self.folder / shard.file
        with explained(self.folder):
            if path.exists():
                return
            file = os.open(temporary(path), os.O_RDWR)
            try:
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(temporary(path), path)

    def finish(self, extra: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """Write the index, the extra text files and, last of all, `config.json`.

        Raises:
            CheckpointError: the disk is full or not writable.
            ValueError: tensors are missing, which would be a bug.
        """
        missing = [file for file, left in self._left.items() if left]
        if missing:
            raise ValueError(f"{len(missing)} shards were never finished, e.g. {missing[0]}")
        with explained(self.folder):
            for shard in self.shards:
                if shard.nbytes == len(shard.header):  # empty tensors only, so nothing was ever counted
                    self.complete(shard)
            if len(self.shards) > 1:
                weight_map = {name: shard.file for name, shard in sorted(self.place.shard_of.items())}
                total = sum(spec.nbytes for shard in self.shards for spec in shard.specs.values())
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_atomically(self.folder / INDEX, json.dumps(index, indent=1))
            for file, text in extra.items():
                write_atomically(self.folder / file, text)
            write_atomically(self.folder / "config.json", json.dumps(config, indent=2))
            (self.folder / UNFINISHED).unlink(missing_ok=True)  # not before: nothing else says "unfinished"

    def _weights(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.suffix in (".safetensors", _TEMPORARY)]


def temporary(path: Path) -> Path:
    """The name of a file that is being written."""
    return path.with_name(path.name + _TEMPORARY)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either absent (or old) or complete."""
    with temporary(path).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary(path), path)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something else than an unfinished run.

    Raises:
        CheckpointError: so it does, and `overwrite` does not allow it.
    """
    if overwrite or not folder.exists() or (folder / UNFINISHED).exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another output folder")
    if any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; choose another output folder or pass --overwrite")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the operating system says while `folder` is written into a `CheckpointError` with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"the disk of {folder} is full; free some space and run the command again") from error
        raise CheckpointError(f"cannot write to {folder}: {error}") from error


def _is_whole(path: Path, shard: Shard) -> bool:
    if path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as stream:
        return stream.read(len(shard.header)) == shard.header


def _chunks(source: Path, begin: int, end: int) -> Iterator[bytes]:
    try:
        with source.open("rb") as stream:
            stream.seek(begin)
            while begin < end:
                data = stream.read(min(_CHUNK, end - begin))
                if not data:
                    raise OSError("the file ends before its header says")
                begin += len(data)
                yield data
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error}") from error
