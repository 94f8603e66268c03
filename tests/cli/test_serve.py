"""`milo serve` with a stand-in for vLLM and for the GPU; `tests/gpu/test_server.py` has both for real."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from milo.checkpoint.writer import UNFINISHED
from milo.cli import serve as module
from milo.cli.app import app
from milo.errors import MiloError
from milo.integrations.serving import Card

GPU = Card("Thing", 16 * 2**30, (9, 0))
FAKE_VLLM = "import json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(7)\n"
# `milo` with a GPU: what `cards` asks of torch is answered before the command starts.
WITH_GPU = """
import types, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda i: types.SimpleNamespace(name="Thing", total_memory=2**34, major=9, minor=0)
from milo.cli.app import main
from milo.kernels import decode
decode.supports = lambda device, dtype: (True, "")
main()
"""


class Started(Exception):
    """vLLM would run now."""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with something that looks like an installed vLLM 0.26, and our plugin's entry point."""
    return install(tmp_path / "site", "0.26.0", monkeypatch)


def install(site: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    main = site / "vllm/entrypoints/cli/main.py"
    main.parent.mkdir(parents=True)
    for package in (site / "vllm", main.parent.parent, main.parent):
        (package / "__init__.py").touch()
    main.write_text(FAKE_VLLM)
    for name, number in (("vllm", version), ("milo_moe", "9")):
        metadata = site / f"{name}-{number}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nmilo = milo.integrations.vllm:register\n")
    monkeypatch.syspath_prepend(site)
    return site


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cards", lambda: [GPU])


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that replaced the process."""
    commands: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        commands.append([program, *command])
        raise Started

    monkeypatch.setattr(os, "execv", execv)
    return commands


def serve(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def refusal(*arguments: str | Path) -> str:
    """The error that `milo serve` ends with."""
    done = serve(*arguments)
    assert isinstance(done.exception, MiloError), done.output
    return str(done.exception)


def test_vllm_takes_the_process_over(compressed_folder: Path, fake_vllm: Path) -> None:
    """As a process: vLLM's exit code and output are its own; our defaults come first, the user's options as typed."""
    options = ["--port", "1234", "-tp", "2", "--max_model_len=4k", "--hf-overrides", '{"a": 1}', "--no-such-thing"]
    paths = os.pathsep.join([str(fake_vllm), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", WITH_GPU, "serve", str(compressed_folder), *options],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    folder = str(compressed_folder)
    command = ["serve", folder, "--dtype", "bfloat16", "--served-model-name", "out", folder, *options]
    assert json.loads(done.stdout) == command
    assert "GiB of weights on each of 2 GPUs" in done.stderr
    assert f"starting {shlex.join(['vllm', *command])}" in done.stderr


@pytest.mark.usefixtures("fake_vllm", "gpu")
def test_it_is_this_interpreters_vllm(compressed_folder: Path, started: list[list[str]]) -> None:
    done = serve(compressed_folder)
    assert isinstance(done.exception, Started)
    assert started[0][:4] == [sys.executable, sys.executable, "-m", "vllm.entrypoints.cli.main"]


def test_dry_run_prints_the_command_where_vllm_and_gpu_are_absent_too(
    compressed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cards", list)
    done = serve(compressed_folder, "--dry-run", "--port", "1234")
    assert done.exit_code == 0, done.output
    printed = shlex.split(done.stdout)
    assert printed[:3] == ["vllm", "serve", str(compressed_folder)]
    assert printed[-2:] == ["--port", "1234"]
    assert "--dry-run" not in printed
    assert "not here: no GPU" in done.stderr


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("version", ["0.25.1", "0.260.0", "unknown"])
def test_another_vllm_is_refused(
    compressed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install(tmp_path, version, monkeypatch)
    assert f"vLLM {version} is not one that MiLo was tested with (0.26 to 0.33): `pip install" in refusal(
        compressed_folder
    )


@pytest.mark.usefixtures("fake_vllm", "gpu")
def test_an_allow_list_without_us_is_refused(compressed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert refusal(compressed_folder).startswith("VLLM_PLUGINS=other keeps vLLM from loading MiLo")
    monkeypatch.setenv("VLLM_PLUGINS", "other,milo")
    assert isinstance(serve(compressed_folder).exception, Started)


@pytest.mark.usefixtures("fake_vllm")
def test_without_a_gpu_it_does_not_start(compressed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cards", list)
    assert refusal(compressed_folder).startswith("no GPU")


@pytest.mark.usefixtures("fake_vllm")
def test_a_gpu_that_is_too_small_is_refused(compressed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cards", lambda: [Card("Tiny", 100_000, (9, 0))])
    assert "GiB are missing before any cache" in refusal(compressed_folder)


def test_a_folder_that_is_not_whole_is_refused(mixtral_folder: Path, compressed_folder: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(compressed_folder, tmp_path / "unfinished")
    (unfinished / UNFINISHED).touch()
    tampered = shutil.copytree(compressed_folder, tmp_path / "tampered")
    config = json.loads((tampered / "config.json").read_text())
    config["quantization_config"]["plan"]["rounds"] += 1
    (tampered / "config.json").write_text(json.dumps(config))
    for folder, words in (
        (unfinished, "unfinished compression"),
        (tampered, "does not match its plan_sha256"),
        (mixtral_folder, "not compressed with MiLo"),
        (tmp_path / "nothing", "not a folder"),
    ):
        assert words in refusal(folder, "--dry-run")


def test_the_folder_comes_first() -> None:
    done = serve("--port", "1234", "OUT")
    assert done.exit_code == 2
    assert "milo serve DIR" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cards_without_a_gpu() -> None:
    assert module.cards() == []
