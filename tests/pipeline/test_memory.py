"""Memory is bounded by the largest piece of work, not by the model: 4 GB in, less than 2 GB resident, mapped pages too.

The checkpoint is a Mixtral whose experts fill pieces exactly (4 × 1024 × 4096 weights) and whose embeddings, half a
gigabyte each, are only copied. It is made of one random tensor written over and over. Every core holds a piece, so
the number of cores is fixed to the two of the smallest machine.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch

import builders
from milo.checkpoint.source import Checkpoint

LAYERS, VOCAB, PER_SHARD = 15, 1 << 18, 150
CHILD = """
import sys
from pathlib import Path
import builders
builders.compress(Path(sys.argv[1]), Path(sys.argv[2]), "rtn", workers=2)
print(Path("/proc/self/status").read_text())
"""


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]], noise: memoryview) -> None:
    """A safetensors file of bfloat16 tensors, all of them made of `noise`."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            for left in range(2 * prod(shape), 0, -len(noise)):
                stream.write(noise[: min(left, len(noise))])


@pytest.fixture
def big_mixtral(tmp_path: Path) -> Iterator[Path]:
    shapes, config = builders.mixtral(LAYERS, hidden=1024, inter=4096, experts=8, kv=256, vocab=VOCAB)
    noise = torch.randn(1024 * 4096, generator=torch.Generator().manual_seed(0)).mul_(0.05).bfloat16()
    folder = tmp_path / "big"
    folder.mkdir()
    names, weight_map = list(shapes), {}
    for first in range(0, len(names), PER_SHARD):
        part = names[first : first + PER_SHARD]
        file = f"model-{first:05d}.safetensors"
        write_shard(folder / file, {name: shapes[name] for name in part}, memoryview(noise.view(torch.uint8).numpy()))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    yield folder
    shutil.rmtree(tmp_path)  # 5 GB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_compressing_4_gb_stays_below_2_gb_resident(big_mixtral: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in big_mixtral.glob("*.safetensors"))
    assert size > 4e9
    command = [sys.executable, "-c", CHILD, str(big_mixtral), str(tmp_path / "out")]
    done = subprocess.run(command, env=builders.child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024  # type: ignore[index]
    print(f"{size / 1e9:.1f} GB compressed with a peak of {peak / 1e9:.2f} GB resident")
    assert peak < 2e9
    out = Checkpoint(tmp_path / "out")
    total = sum(info.nbytes for info in out.tensors.values())
    copied = 2 * 2 * VOCAB * 1024
    assert 0.21 < (total - copied) / (size - copied) < 0.23  # 3.5 of 16 bits
