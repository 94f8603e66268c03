"""The demo's text: the Python standard library that runs it.

A demo which works on a bare machine cannot download a data set, but every Python installation carries a few
megabytes of text: its own standard library, code and English documentation side by side. That is enough to
train a small language model until its weights have the structure that makes quantisation interesting.

Held-out text must be text that the model has not seen, so WHOLE top-level modules (``json/*``, ``queue.py``)
are held out, never parts of a module which also trains: the files of one package repeat each other. A hash of
the module's name decides, which is the same decision on every machine and does not change for one module when
others come or go with the Python version. The same hash orders the modules, so that a corpus cut at its size
limit is a sample of all modules rather than the beginning of the alphabet.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from milo.errors import MiloError

# Not the library itself, or hardly text: installed packages, test suites and their data, an editor, the
# generated code pages of `encodings`, grammars and fixers, build settings.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "__pycache__"}
)
_SKIPPED_PREFIXES = ("config-", "_sysconfig")

_HELD_OUT_SHARE = 0.06
_TRAIN_BYTES = 4_000_000
_HELD_OUT_BYTES = 400_000
_TOO_LITTLE_BYTES = 500_000


def stdlib_corpus(stdlib: Path | None = None) -> tuple[str, str]:
    """Reads the standard library's sources as one training text and one held-out text.

    Args:
        stdlib: The folder to read; by default that of the running interpreter.

    Returns:
        ``(train_text, heldout_text)``: whole files in a fixed order, joined by blank lines, at most about
        4 MB and 0.4 MB. No top-level module contributes to both.

    Raises:
        MiloError: The folder holds too little source text, as in installations which ship the library only
            compiled or zipped.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    ranked = sorted((_rank(path.relative_to(root)), path) for path in _sources(root))
    train = _join((path for rank, path in ranked if rank[0] >= _HELD_OUT_SHARE), _TRAIN_BYTES)
    held_out = _join((path for rank, path in ranked if rank[0] < _HELD_OUT_SHARE), _HELD_OUT_BYTES)
    if len(train) < _TOO_LITTLE_BYTES or not held_out:
        raise MiloError(
            f"{root} holds too little Python source text to train the demo's model ({len(train)} characters): "
            "this Python seems to ship its library without .py files. Use another Python installation."
        )
    return train, held_out


def _sources(root: Path) -> Iterator[Path]:
    """Yields every usable ``.py`` file under ``root``, in no particular order."""
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        is_skipped_folder = not _SKIPPED_FOLDERS.isdisjoint(relative.parts)
        if not is_skipped_folder and not relative.parts[0].startswith(_SKIPPED_PREFIXES):
            yield path


def _rank(relative: Path) -> tuple[float, str]:
    """The file's place in the order: its top-level module's hash as a number in [0, 1), then its name."""
    module = relative.parts[0].removesuffix(".py")
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32, relative.as_posix()


def _join(paths: Iterable[Path], max_bytes: int) -> str:
    """Joins whole files by blank lines until the next one would pass ``max_bytes``."""
    texts: list[str] = []
    size = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:  # a source in an old encoding: too few to matter
            continue
        size += len(text.encode())
        if size > max_bytes:
            break
        if text:
            texts.append(text)
    return "\n\n".join(texts)
