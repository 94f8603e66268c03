"""Runs the CUDA kernels' own sources on a CPU (see primitives.cuh here), through the host code that launches them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from milo.kernels import decode, nvrtc, prefill, prefill_config
from milo.kernels.cutting import Config
from milo.kernels.launching import Workspace

HERE = Path(__file__).parent
SLOTS = 5  # blocks that "run at a time": few, so that stretches begin and end anywhere


def _compiled(driver: str, source: str, macros: dict[str, int], folder: Path) -> ctypes.CDLL:
    library = folder / f"{Path(source).stem}-{'-'.join(map(str, macros.values()))}.so"
    if not library.exists():
        sources = folder / "src"
        if not sources.exists():
            shutil.copytree(nvrtc.SOURCES, sources)
            for replaced in (*HERE.glob("*.cuh"), *HERE.glob("*.cpp")):
                shutil.copy(replaced, sources)
        flags = [f"-D{key}={value}" for key, value in macros.items()] + [f'-DEMULATED="{source}"']
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *flags, str(sources / driver)]
        subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class EmulatedKernels:
    """Takes the place of `decode._Kernels`."""

    slots = SLOTS

    def __init__(self, config: Config, bits: int, halves: int, b16: bool, folder: Path) -> None:
        macros = decode.macros(config, bits, halves, b16)
        self._library = _compiled("driver.cpp", config.source, macros, folder)
        self._shared = {"gate_up": config.shared_bytes(bits, halves), "combine": 4 * config.pairs}
        self._shared["down"] = self._shared["gate_up"]

    def _launch(self, name: str, blocks: int, threads: int, params: ctypes.Structure) -> None:
        getattr(self._library, f"launch_{name}")(blocks, threads, self._shared[name], ctypes.byref(params))

    def __getattr__(self, name: str) -> Any:
        def launch(blocks: int, threads: int, params: ctypes.Structure, early: bool = False) -> None:
            self._launch(name, blocks, threads, params)

        return launch


class Counters:
    """Takes the place of `decode._counters`."""

    def __init__(self) -> None:
        self.memory = torch.zeros(3, decode._COUNTER_BYTES, dtype=torch.uint8)

    def of(self, stream: int) -> list[int]:
        return [row.data_ptr() for row in self.memory]


@contextmanager
def emulated(folder: Path) -> Iterator[Counters]:
    """`decode.moe_ffn` and `decode.linear` on CPU tensors; gives the counters, which must be zero in the end."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    @cache
    def kernels(config: Config, bits: int, halves: int, b16: bool, device: Any) -> EmulatedKernels:
        return EmulatedKernels(config, bits, halves, b16, folder)

    counters = Counters()
    with (
        patch.object(decode, "_kernels", kernels),
        patch.object(decode, "_counters", lambda device: counters),
        patch.object(decode, "_fitting", lambda configs, *rest: configs),
        patch.object(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0)),
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
    ):
        yield counters


class EmulatedPrefill:
    """Takes the place of `prefill._Kernels`."""

    def __init__(
        self, config: prefill_config.Config, bits: int, halves: int, b16: bool, kind: int, folder: Path
    ) -> None:
        self._library = _compiled("prefill_driver.cpp", "prefill.cu", config.macros(bits, halves, b16, kind), folder)
        self._shared = {"multiply": config.ring(bits, halves)[1], "prepare": 0, "combine": 0}

    def __getattr__(self, name: str) -> Any:
        def launch(
            blocks: int, threads: int, params: ctypes.Structure, early: bool = False, shared_bytes: int | None = None
        ) -> None:
            shared = self._shared[name] if shared_bytes is None else shared_bytes
            getattr(self._library, f"launch_{name}")(blocks, threads, shared, ctypes.byref(params))

        return launch


class Poisoned(Workspace):
    """Takes the place of `prefill.Workspace`: what nobody has written is not a number."""

    def __init__(self, device: torch.device, **sizes: int) -> None:
        super().__init__(device, **sizes)
        self._memory.fill_(0xFF)


@contextmanager
def emulated_prefill(folder: Path, processors: int) -> Iterator[None]:
    """`prefill.moe_ffn` and `prefill.linear` on CPU tensors, as if there were so many processors."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    @cache
    def kernels(
        config: prefill_config.Config, bits: int, halves: int, b16: bool, kind: int, device: Any
    ) -> EmulatedPrefill:
        return EmulatedPrefill(config, bits, halves, b16, kind, folder)

    with (
        patch.object(prefill, "_kernels", kernels),
        patch.object(prefill, "Workspace", Poisoned),
        patch.object(prefill, "_processors", lambda device: processors),
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
    ):
        yield
