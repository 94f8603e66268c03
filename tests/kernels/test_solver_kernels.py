"""The solver's Triton kernels under Triton's interpreter, on CPU tensors (a device runs the same checks: tests/gpu)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import builders
import solver_checks

THIN = 25  # of the checks every 25th: the interpreter is slow


def test_the_kernels_agree_with_pytorch_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    # The interpreter is chosen when a kernel is defined, by this variable alone: hence a process of its own.
    environment = {**builders.child_environment(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(solver_checks.__file__)), str(THIN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checks passed on cpu" in done.stdout
