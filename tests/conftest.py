"""Fixtures that several rooms share: tiny checkpoints, made once a session and never changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
import builders
from milo.checkpoint.compressed import CompressedCheckpoint

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Mixtral in three shards. Read-only: copy it before you damage it."""
    return builders.tiny_mixtral(tmp_path_factory.mktemp("source") / "mixtral", shards=3)


@pytest.fixture(scope="session")
def compressed_folder(mixtral_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixtral_folder`, compressed with different ranks. Read-only."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    builders.compress(mixtral_folder, out, ranks="dense:8+kurtosis:3", rounds=2)
    CompressedCheckpoint(out)  # it is whole
    return out


@pytest.fixture(scope="session")
def trained_mixtral() -> Path:
    """The small trained Mixtral that lies beside the project, where it does."""
    folder = SHARED / "models" / "mixtral-29m"
    if not folder.is_dir():
        pytest.skip("needs ../shared/models/mixtral-29m")
    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[browser.Browser]:
    """A headless browser, where there is one."""
    with browser.Browser(browser.find()) as found:
        yield found
