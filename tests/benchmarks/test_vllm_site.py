"""What of a shared object's CUDA code is kept for one GPU, and that nothing else of the file changes."""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PTX, CODE = 1, 2


@pytest.fixture(scope="module")
def site() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import vllm_site

        yield vllm_site


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """A fat binary of (kind, architecture), the code being 16 times that number's low byte."""
    body = b""
    for kind, architecture in entries:
        head = struct.pack("<HHIQIIHHI", kind, 1, 64, 16, 16, 0, 0, 8, architecture)
        body += head.ljust(64, b"\0") + bytes([architecture]) * 16
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    ("entries", "kept"),
    [
        ([(CODE, 75), (CODE, 90), (CODE, 90), (CODE, 120), (PTX, 90)], [1, 2]),  # 9.0 and 9.0a
        ([(CODE, 80), (CODE, 120), (PTX, 80)], [2]),
        ([(CODE, 80), (PTX, 75), (PTX, 80), (PTX, 120)], [2]),
        ([(CODE, 100)], []),
    ],
)
def test_a_gpu_takes_its_code_or_the_newest_ptx(
    site: ModuleType, tmp_path: Path, entries: list[tuple[int, int]], kept: list[int]
) -> None:
    whole = b"\x7fELF text" + fat_binary(*entries) + b"tail" + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 1 << 40)
    path = tmp_path / "lib.so"
    path.write_bytes(whole)
    assert site.keep_only(path, 90) == 16 * (len(entries) - len(kept))
    changed = path.read_bytes()
    assert len(changed) == len(whole)
    (found,) = site.fat_binaries(changed)
    for number, entry in enumerate(found):
        expected = bytes([entries[number][1]] if number in kept else [0]) * 16
        assert changed[entry.begin : entry.end] == expected
    outside = [set(range(entry.begin, entry.end)) for entry in found]
    assert all(whole[i] == changed[i] for i in set(range(len(whole))).difference(*outside))


def test_a_checkout_is_registered_as_if_installed(
    site: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "some-thing"\nversion = "1.2"\n[project.scripts]\nthing = "a.b:c"\n'
        '[project.entry-points."some.group"]\nplug = "a.b:d"\n'
    )
    site.register(tmp_path / "site", project)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert importlib.metadata.version("some-thing") == "1.2"
    assert [(each.name, each.value) for each in importlib.metadata.entry_points(group="some.group")] == [
        ("plug", "a.b:d")
    ]
