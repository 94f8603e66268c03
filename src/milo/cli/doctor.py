"""`milo doctor`: what this environment can do, and why not more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import torch
from rich.table import Table
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import milo
from milo.checkpoint.compressed import FORMAT_VERSION, QUANT_METHOD
from milo.cli.console import out, print_json, size
from milo.cli.options import JsonOption
from milo.kernels import decode, prefill

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "triton",
    "vllm",
)


def examine() -> dict[str, Any]:
    """Versions, devices, kernels."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
            }
        )
    return {
        "milo": milo.__version__,
        "format_version": FORMAT_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "byte_order": sys.byteorder,
        "cpus": os.cpu_count(),
        "free_disk": shutil.disk_usage(".").free,
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "quantizer_registered": QUANT_METHOD in AUTO_QUANTIZER_MAPPING,
        "kernels": kernels(),
    }


def kernels() -> list[dict[str, Any]]:
    """Every implementation of the compressed matrix product, whether it runs here, and why (not)."""
    cuda = torch.device("cuda")
    few, no_few = decode.supports(cuda, torch.float16)
    many, no_many = prefill.supports(cuda, torch.float16)
    return [
        {
            "kernel": "int3/int4 decode (milo.ops)",
            "runs": few,
            "reason": "CUDA, compiled at first use, for few tokens an expert; any number without the next"
            if few
            else no_few,
        },
        {
            "kernel": "int3/int4 prefill (milo.ops)",
            "runs": many,
            "reason": f"wgmma, compiled at first use, from {prefill.MIN_MEAN_TOKENS} tokens an expert"
            if many
            else no_many,
        },
        {
            "kernel": "reference",
            "runs": True,
            "reason": "PyTorch on any device: rebuilds the weights it uses at every call, so it is correct, not fast",
        },
    ]


def doctor(as_json: JsonOption = False) -> None:
    """Report the environment, the devices and the kernels, with reasons."""
    found = examine()
    if as_json:
        print_json(found)
        return
    table = Table(show_header=False, title="environment", title_justify="left")
    table.add_row("milo", f"{found['milo']} (format {found['format_version']})")
    table.add_row("python", f"{found['python']} on {found['platform']}, {found['cpus']} CPUs")
    for name, version in found["packages"].items():
        table.add_row(name, version or "not installed")
    table.add_row("free disk here", size(found["free_disk"]))
    table.add_row("transformers quantizer", "registered" if found["quantizer_registered"] else "NOT registered")
    for device in found["devices"]:
        table.add_row("GPU", f"{device['name']}, sm_{device['capability'].replace('.', '')}, {size(device['memory'])}")
    if not found["devices"]:
        cause = "this PyTorch is a CPU build" if found["cuda"] is None else "PyTorch sees no CUDA device"
        table.add_row("GPU", f"none: {cause}")
    out.print(table)
    table = Table(title="kernels", title_justify="left")
    for column in ("kernel", "runs here", "why"):
        table.add_column(column)
    for kernel in found["kernels"]:
        table.add_row(kernel["kernel"], "yes" if kernel["runs"] else "no", kernel["reason"])
    out.print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
