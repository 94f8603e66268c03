"""Which devices solve, and which pool drives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from milo.errors import DeviceError
from milo.pipeline.pools import Lane, Pool, ProcessPool, ThreadPool
from milo.pipeline.work import worker_count


def visible_devices(choice: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """The devices a choice means.

    Args:
        choice: `cuda` for all visible GPUs, `cpu`, or names such as `cuda:0,cuda:1`. A name may stand twice, which
            starts two processes on it. None: the GPUs if there are any, else the CPU.

    Raises:
        DeviceError: an unknown device, a GPU that is not there, or a mixture of GPUs and CPU, whose results would
            differ in their last bits depending on who solved what.
    """
    gpus = torch.cuda.device_count()
    if choice is None:
        choice = "cuda" if gpus else "cpu"
    names = choice.split(",") if isinstance(choice, str) else list(choice)
    if names == ["cuda"] and gpus:
        return tuple(f"cuda:{i}" for i in range(gpus))
    found = []
    for name in (name.strip() for name in names):
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise DeviceError(f"{name!r} is no device that MiLo solves on; write cpu, cuda, or cuda:0,cuda:1")
        if device.type == "cuda" and (device.index or 0) >= gpus:
            raise DeviceError(f"{name} is not there; this machine shows PyTorch {gpus} GPUs")
        found.append(f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu")
    if len({name.partition(":")[0] for name in found}) > 1:
        raise DeviceError(f"{','.join(found)} mixes GPUs and CPU, so the result would depend on who solved what")
    return tuple(found)


def parallel_items(devices: Sequence[str], workers: int | None) -> int:
    """Items that are solved at the same time in one process."""
    return (workers or worker_count("cpu")) if tuple(devices) == ("cpu",) else 1


def open_pool(devices: Sequence[str], workers: int | None = None, ray: bool = False) -> Pool:
    """The pool for these devices, which gets ready from now on.

    Args:
        devices: from `visible_devices`.
        workers: threads, if the CPU solves; its cores by default.
        ray: ignore both and use whatever the Ray cluster has.

    Raises:
        DeviceError: Ray is not installed.
    """
    if ray:
        from milo.pipeline.on_ray import RayPool  # an extra

        return RayPool()
    if len(devices) > 1:
        return ProcessPool(devices)
    if devices[0] == "cpu":
        return ThreadPool(workers or worker_count("cpu"))
    return Lane(devices[0])
