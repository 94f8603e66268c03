"""The journal: what of an output folder is finished, so that the same command goes on after any kind of end.

`milo_journal.jsonl` lies beside the shards while a run is unfinished. Its first line says what the run is (plan,
source, shard size, version); every other line is one finished work item with the SHA-256 of the bytes it wrote and
what it measured. A line carries a digest of its own, and is written in one call after its item's bytes.

Nothing in it is trusted: a resumed run hashes the bytes on disk and solves again what does not match. That makes the
order in which the operating system flushes journal and shards irrelevant, so a line is not flushed by itself: a
killed process loses nothing, a power cut costs what the disk had not received, which is solved again. Only the first
line and the journal of finished shards are flushed. A last line without its line break is the one that was being
written; it is dropped. Any other damage is an error, since a file that has changed behind our back says that the
folder may have, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milo.checkpoint.writer import UNFINISHED, explained, write_atomically
from milo.errors import CheckpointError

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None  # type: ignore[assignment]

_DIGEST = "digest"


class Journal:
    """An open journal. `begin` makes one, `resume` opens one.

    Attributes:
        path: the file.
        entries: what stood in it when it was opened, oldest first.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / UNFINISHED
        self.entries: list[dict[str, Any]] = []
        with explained(folder):
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self._lock()

    @classmethod
    def begin(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """Start one; an older one is replaced (but not under a run that still goes on)."""
        if (folder / UNFINISHED).exists():
            cls(folder).close()
        with explained(folder):
            write_atomically(folder / UNFINISHED, _line(header))
        return cls(folder)

    @classmethod
    def resume(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """Open the journal of an unfinished run, ready to be continued.

        Raises:
            CheckpointError: damaged, of another run, or of one that is still going on.
        """
        journal = cls(folder)
        try:
            first, journal.entries = journal._read()
            journal._compare(first, header)
        except CheckpointError:
            journal.close()
            raise
        return journal

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        with explained(self.path.parent):
            data = _line(entry).encode()
            if os.write(self._file, data) < len(data):
                raise CheckpointError(f"the disk of {self.path} is full; free some space and run the command again")

    def flush(self) -> None:
        """Wait until all lines are on the disk."""
        with explained(self.path.parent):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CheckpointError(
                f"another process is compressing into {self.path.parent}; wait for it or choose another output folder"
            ) from None
        except OSError:
            pass  # a disk without locks

    def _read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        text = self.path.read_bytes()
        whole, _, torn = text.rpartition(b"\n")
        lines = [self._parse(number, line) for number, line in enumerate(whole.split(b"\n"), start=1)]
        if torn:
            os.ftruncate(self._file, len(text) - len(torn))
        return lines[0], lines[1:]

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            digest = entry.pop(_DIGEST)
            if digest == _digest(entry):
                return entry
        except (ValueError, KeyError, AttributeError):
            pass
        raise CheckpointError(
            f"{self.path} is damaged in line {number}; nothing was touched. Pass --restart to start over, or put an "
            "intact copy of the journal back"
        )

    def _compare(self, first: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        for key, value in header.items():
            then = first.get(key)
            if then == value:
                continue
            if isinstance(value, Mapping) and isinstance(then, Mapping):
                files = sorted(file for file in {*value, *then} if value.get(file) != then.get(file))
                what = f"{key}: {', '.join(files[:3])} changed"
            else:
                what = f"{key}: {_short(then)} then, {_short(value)} now"
            raise CheckpointError(
                f"{self.path.parent} holds an unfinished run of another kind ({what}); repeat its command to finish "
                "it, or pass --restart to start over"
            )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else str(value)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps({**entry, _DIGEST: _digest(entry)}, separators=(",", ":")) + "\n"


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, separators=(",", ":")).encode()).hexdigest()[:16]
