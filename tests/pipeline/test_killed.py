"""kill -9 at random moments: whatever was being written, the same command ends with the same files.

One child process imports everything once and forks a run for each moment, which costs milliseconds. A moment is the
n-th change of the file system that a run makes, n drawn with a fixed seed: a write stops half-way, anything else does
not happen, and the process is gone in the same instant.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import builders

MOMENTS = 12
CHILD = f"""
import os, random, signal, sys
from pathlib import Path
import torch
import builders

torch.set_num_threads(1)
KNOBS = dict(ranks="dense:3+kurtosis:2", rounds=1, max_shard_size=20_000, workers=2)
CHANGES = ("write", "pwrite", "replace", "fsync", "posix_fallocate", "unlink")
source, root = map(Path, sys.argv[1:])

def run(out, moment=None):
    '''One run in a process of its own, killed at a moment; returns the number of changes, 0 if it was killed.'''
    read, write = os.pipe()
    if os.fork() == 0:
        count = 0
        def watched(name, real):
            def call(*args):
                nonlocal count
                count += 1
                if count == moment:
                    if name in ("write", "pwrite"):
                        file, data, *offset = args
                        real(file, data[: len(data) // 2], *offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)
            return call
        unwatched = os.write
        for name in CHANGES:
            setattr(os, name, watched(name, getattr(os, name)))
        builders.compress(source, out, **KNOBS)
        unwatched(write, str(count).encode())
        os._exit(0)
    os.close(write)
    _, status = os.wait()
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, status
    return 0 if killed else int(os.read(read, 20))

total = run(root / "undisturbed")
want = builders.file_hashes(root / "undisturbed")
draw = random.Random(5)
moments = sorted(draw.sample(range(2, total), {MOMENTS}))
for moment in moments:
    out = root / str(moment)
    assert run(out, moment) == 0
    assert not (out / "config.json").exists() or (out / "milo_journal.jsonl").exists()
    assert run(out) > 0
    assert builders.file_hashes(out) == want, moment

again = root / "again and again"  # every resumed run is killed as well, until one has too little left to do
kills = 0
while run(again, draw.randrange(20, total // 3)) == 0:
    kills += 1
    assert kills < 60
assert builders.file_hashes(again) == want
print({{"total": total, "moments": moments, "kills": kills}}.__repr__().replace("'", '"'))
"""


def test_killed_at_random_moments_and_resumed_gives_the_undisturbed_files(tmp_path: Path) -> None:
    source = builders.tiny_mixtral(tmp_path / "source", shards=2, layers=1, experts=3)
    command = [sys.executable, "-c", CHILD, str(source), str(tmp_path)]
    done = subprocess.run(command, env=builders.child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    print(told)
    assert len(told["moments"]) == MOMENTS >= 10
    assert told["kills"] >= 2
