"""kill -9 in the middle: what is left is refused by every loader, and the same command finishes the work.

A child process compresses with a solver slowed down, reports each matrix, and is killed without a chance to clean up.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import builders
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.writer import UNFINISHED
from milo.errors import CheckpointError

KNOBS = {"ranks": "dense:4+kurtosis:2", "rounds": 2, "max_shard_size": 20_000}
CHILD = f"""
import sys, time
from pathlib import Path
import builders
from milo.pipeline import job
solve = job.solve_piece
def slow(*args):
    sys.stdout.write("solving\\n")
    sys.stdout.flush()
    time.sleep(0.2)
    return solve(*args)
job.solve_piece = slow
builders.compress(Path(sys.argv[1]), Path(sys.argv[2]), **{KNOBS!r})
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_is_refused_and_running_again_gives_the_undisturbed_result(
    mixtral_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(mixtral_folder), str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=builders.child_environment())
    assert child.stdout is not None
    seen = [child.stdout.readline().strip() for _ in range(9)]
    child.send_signal(signal.SIGKILL)
    assert seen == ["solving"] * 9
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()

    assert (out / UNFINISHED).exists()
    assert not (out / "config.json").exists()
    assert list(out.glob("*.safetensors"))  # some shards were complete already
    with pytest.raises(CheckpointError, match="is an unfinished compression; run the same `milo quantize` again"):
        CompressedCheckpoint(out)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(out)

    builders.compress(mixtral_folder, out, **KNOBS)
    builders.compress(mixtral_folder, tmp_path / "undisturbed", **KNOBS)
    assert builders.file_hashes(out) == builders.file_hashes(tmp_path / "undisturbed")
    CompressedCheckpoint(out)
