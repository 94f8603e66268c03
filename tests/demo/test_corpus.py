"""The corpus is fixed, its two texts are of different modules, and poor installations are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from milo.demo import corpus
from milo.demo.corpus import stdlib_corpus
from milo.errors import MiloError


def make_library(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_TOO_LITTLE_BYTES", 10)


@pytest.fixture(scope="module")
def library() -> tuple[str, str]:
    return stdlib_corpus()


def test_the_corpus_is_the_same_each_time_and_of_a_few_megabytes(library):
    train, held_out = library
    assert library == stdlib_corpus()
    assert 500_000 < len(train.encode()) <= 4_100_000
    assert 50_000 < len(held_out.encode()) <= 410_000


def test_whole_modules_are_held_out(library):
    train, held_out = library
    pieces = [p for p in held_out.split("\n\n") if len(p) > 300]
    assert len(pieces) > 100
    assert not [p for p in pieces if p in train]


def test_a_package_is_never_split(tmp_path, small_limits):
    names = [f"module{i}" for i in range(200)]
    files = {f"{n}/{part}.py": f"{n} {part} is here" for n in names for part in ("a", "b", "deep/c")}
    train, held_out = stdlib_corpus(make_library(tmp_path, files))
    for name in names:
        in_train, in_held_out = (sum(f"{name} " in line for line in text.splitlines()) for text in (train, held_out))
        assert sorted((in_train, in_held_out)) == [0, 3]
    assert 2 <= len(held_out.split("\n\n")) // 3 <= 30


def test_what_is_not_the_library_is_skipped(tmp_path, small_limits):
    keep = {f"module{i}.py": f"text of module {i}" for i in range(60)}
    skip = {
        "site-packages/other/a.py": "SKIPPED",
        "test/test_a.py": "SKIPPED",
        "unittest/test/b.py": "SKIPPED",
        "encodings/cp1.py": "SKIPPED",
        "config-3.11-x/a.py": "SKIPPED",
        "_sysconfigdata_x.py": "SKIPPED",
        "data.txt": "SKIPPED",
    }
    train, held_out = stdlib_corpus(make_library(tmp_path, keep | skip))
    assert "SKIPPED" not in train + held_out
    assert (train + held_out).count("text of module") == 60


def test_sources_in_old_encodings_are_left_out(tmp_path, small_limits):
    library = make_library(tmp_path, {f"module{i}.py": f"text of module {i}" for i in range(60)})
    (library / "latin.py").write_bytes("# größer".encode("latin-1"))
    assert "text of module 7" in "".join(stdlib_corpus(library))


def test_limits_cut_at_whole_files(tmp_path, small_limits, monkeypatch):
    monkeypatch.setattr(corpus, "_TRAIN_BYTES", 100)
    train, _ = stdlib_corpus(make_library(tmp_path, {f"module{i}.py": "x" * 30 for i in range(60)}))
    assert train == "\n\n".join(["x" * 30] * 3)


def test_an_installation_without_sources_is_refused(tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"compiled")
    with pytest.raises(MiloError, match="another Python installation"):
        stdlib_corpus(tmp_path)
