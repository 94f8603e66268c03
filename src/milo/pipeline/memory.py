"""Peak memory of a process and of its GPU."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Peak:
    """Bytes: of a process, resident, and of its GPU, allocated by PyTorch."""

    process: int = 0
    host: int = 0
    gpu: int = 0

    @classmethod
    def now(cls, device: str = "cpu") -> Peak:
        """The peak of this process so far."""
        return cls(
            os.getpid(), host_peak(), torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0
        )


def host_peak() -> int:
    """Peak resident bytes of this process."""
    # Not ru_maxrss: Linux hands that of the parent down through fork and exec.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def host_now() -> int:
    """Resident bytes of this process, or their peak where the system does not tell."""
    return _status("VmRSS") or host_peak()


def _status(key: str) -> int | None:
    """Bytes from Linux's account of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None
