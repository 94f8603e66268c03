"""`milo push` against a stand-in hub on this machine: every byte arrives, and failures say what to do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import builders
import hub
from milo.checkpoint.publish import publish
from milo.cli.app import app
from milo.errors import CheckpointError, HubError


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A client that may write, whatever this machine's own settings are."""
    monkeypatch.setenv("HF_TOKEN", hub.WRITER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # Not Xet: its storage protocol needs its own servers, while git LFS is plain HTTP.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def test_every_file_arrives_byte_for_byte_and_config_last(compressed_folder: Path) -> None:
    with hub.serve() as server:
        server.files["model-00001-of-00009.safetensors"] = b"an earlier upload"
        command = ["push", str(compressed_folder), "me/tiny-milo", "--private", "--endpoint", server.url]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert f"{server.url}/me/tiny-milo" in done.output
        asked = server.repos["me/tiny-milo"]
        assert asked.get("visibility") == "private" or asked.get("private") is True  # huggingface_hub 2.x, 1.x
        assert server.files == {path.name: path.read_bytes() for path in compressed_folder.iterdir()}
        assert server.commits[-1] == ["config.json"]
        assert all("config.json" not in commit for commit in server.commits[:-1])
        assert not server.unknown


@pytest.mark.parametrize(("token", "words"), [("", "hf auth login"), (hub.READER, "may not write me/tiny-milo")])
def test_without_permission_it_says_what_to_do(
    compressed_folder: Path, monkeypatch: pytest.MonkeyPatch, token: str, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with hub.serve() as server:
        with pytest.raises(HubError, match=words):
            publish(compressed_folder, "me/tiny-milo", endpoint=server.url)
        assert not server.files


def test_a_hub_that_is_not_there(compressed_folder: Path) -> None:
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(HubError, match=f"cannot reach {url}"):
            publish(compressed_folder, "me/x", endpoint=url)


def test_a_name_that_no_hub_takes(compressed_folder: Path) -> None:
    with pytest.raises(HubError, match="no repository name"):
        publish(compressed_folder, "a/b/c", endpoint="http://127.0.0.1:9")


def test_a_damaged_folder_is_not_published(compressed_folder: Path, tmp_path: Path) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "folder")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with hub.serve() as server:
        with pytest.raises(CheckpointError, match=shard.name):
            publish(folder, "me/x", endpoint=server.url)
        assert not server.repos
