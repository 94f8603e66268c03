"""What every benchmark's JSON says about where it was measured, and how it is written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import milo
from milo.checkpoint.writer import write_atomically


def device_name(device: str | torch.device) -> str:
    """The GPU's name, or the processor's and PyTorch's threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return platform.processor()


def header(device: str | torch.device, settings: Mapping[str, Any], *packages: str) -> dict[str, Any]:
    """The device, then the settings, then the versions of MiLo and of `packages` (by their import names)."""
    versions = {name: import_module(name).__version__ for name in packages}
    return {"device": device_name(device), **settings, "milo": milo.__version__, **versions}


def figures(row: Mapping[str, Any]) -> str:
    """A row's microseconds for people; a dash for what was not timed or failed."""
    times = {key.removesuffix("_us"): value for key, value in row.items() if key.endswith("_us")}
    return "  ".join(f"{name} {'–' if value is None else f'{value:.1f}'}" for name, value in times.items())


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the JSON; the file is either old or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
