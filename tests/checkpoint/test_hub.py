"""Names of models: local folders win, hub names are downloaded, and what is neither says what to check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from milo.checkpoint import hub
from milo.checkpoint.hub import find_model
from milo.errors import CheckpointError


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Hub downloads that were asked for; every one of them fails unless the name says otherwise."""
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "there/is":
            raise LocalEntryNotFoundError("no network")
        return "/cache/there"

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("name", ["./a/b", "/a/b", "~/b", "b", "a/b/c"])
def test_what_looks_like_a_path_is_one(name: str, downloads: list[Any]) -> None:
    assert find_model(name) == Path(name).expanduser()
    assert not downloads


def test_an_existing_folder_wins_over_a_hub_name(
    downloads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "is").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("there/is") == Path("there/is")
    assert not downloads


def test_a_hub_name_is_downloaded_without_pickles(downloads: list[tuple[str, list[str]]]) -> None:
    assert find_model("there/is") == Path("/cache/there")
    (name, patterns) = downloads[0]
    assert name == "there/is"
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern or "pt" in pattern for pattern in patterns)


def test_a_name_that_cannot_be_downloaded_says_what_to_check(downloads: list[Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"^no/such is no local folder and cannot be downloaded \(LocalEntry.*name"
    ):
        find_model("no/such")
