"""Telling whether a source is still the one a run began with, in seconds and without trusting dates.

Every file contributes its size, the SHA-256 of its header (names, dtypes, shapes, offsets), and the bytes of one
block in the middle of each tensor. So another model, another fine-tune, a re-sharded or re-quantised copy are told
apart; a copy of the same files on another disk is the same source. A single altered weight outside the samples is
not seen: that would take reading the whole model.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from milo.checkpoint.source import Checkpoint, TensorInfo
from milo.errors import CheckpointError

BLOCK = 4096  # bytes looked at in each tensor: a page, the least a disk reads


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """A digest for each file of the source that the output depends on: the shards and `config.json`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    by_file: dict[Path, list[TensorInfo]] = defaultdict(list)
    for info in checkpoint.tensors.values():
        by_file[info.file].append(info)
    with ThreadPoolExecutor(8, "fingerprint") as pool:
        digests = list(pool.map(_digest, by_file, by_file.values()))
    found = {file.name: digest for file, digest in zip(by_file, digests, strict=True)}
    found["config.json"] = hashlib.sha256((checkpoint.folder / "config.json").read_bytes()).hexdigest()[:32]
    return found


def _digest(file: Path, tensors: list[TensorInfo]) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            digest.update(stream.read(min(info.begin for info in tensors)))
            digest.update(str(file.stat().st_size).encode())
            for info in sorted(tensors, key=lambda info: info.begin):
                middle = max(info.begin, (info.begin + info.end - BLOCK) // 2)
                stream.seek(middle)
                digest.update(stream.read(min(BLOCK, info.end - middle)))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    return digest.hexdigest()[:32]
