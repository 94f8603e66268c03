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
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
