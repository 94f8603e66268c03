"""Runs the CUDA kernels' own sources on a CPU (see primitives.cuh here), through the host code that launches them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from milo.kernels import decode, nvrtc
from milo.kernels.cutting import Config

HERE = Path(__file__).parent
SLOTS = 5  # blocks that "run at a time": few, so that stretches begin and end anywhere


class EmulatedKernels:
    """Takes the place of `decode._Kernels`."""

    slots = SLOTS

    def __init__(self, config: Config, bits: int, halves: int, b16: bool, folder: Path) -> None:
        macros = decode.macros(config, bits, halves, b16)
        name = "-".join(map(str, [config.source, *macros.values()]))
        library = folder / f"{name}.so"
        if not library.exists():
            sources = folder / "src"
            if not sources.exists():
                shutil.copytree(nvrtc.SOURCES, sources)
                shutil.copy(HERE / "primitives.cuh", sources)
                shutil.copy(HERE / "driver.cpp", sources)
            flags = [f"-D{key}={value}" for key, value in macros.items()] + [f'-DEMULATED="{config.source}"']
            command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *flags, str(sources / "driver.cpp")]
            subprocess.run([*command, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
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
        patch.object(torch.cuda, "device", lambda device: patch.object(decode, "_SHARED", 0)),
    ):
        yield counters
