"""Seconds from a new process to the first results of a model's kernels: nothing compiled before, then all of it.

    python benchmarks/first_use.py [--shape mixtral-8x7b] [--out FILE.json]

Each time is a process of its own whose home folder, and with it the cache, is empty at first and kept for the second.
Kernels do not depend on a model's sizes, so one layer stands for a model: everything that it may need is compiled,
for few tokens and for many, side by side; then FFN and linear are called once at every number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()  # before anything large is imported

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def measure(shape_name: str, device_name: str, tokens: Sequence[int] = TOKENS) -> dict[str, float]:
    """Seconds of importing, making the layer, compiling, calling, and of all."""
    import torch
    from synthetic import SHAPES, compile_ahead, random_layers, random_matrix, route

    from milo import ops

    marks = [BEGIN, time.perf_counter()]
    shape, device = SHAPES[shape_name], torch.device(device_name)
    layer = random_layers(shape._replace(experts=2 * shape.topk), 32, device)[0]
    dense = random_matrix(1, shape.hidden, shape.hidden, 1, 512, device)
    _synchronize(device)
    marks.append(time.perf_counter())

    def call(count: int) -> None:
        x = torch.randn(count, shape.hidden, device=device, dtype=torch.bfloat16)
        ids = route("random", count, shape._replace(experts=2 * shape.topk), device)
        ops.moe_ffn(x, *layer, ids, torch.rand(count, shape.topk, device=device))
        ops.linear(x, dense)

    compile_ahead(torch.bfloat16, device)
    _synchronize(device)
    marks.append(time.perf_counter())
    for count in tokens:
        call(count)
    _synchronize(device)
    marks.append(time.perf_counter())
    parts = [after - before for before, after in pairwise(marks)]
    return dict(zip(("import_s", "layer_s", "compile_s", "calls_s"), parts, strict=True)) | {"total_s": sum(parts)}


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mixtral-8x7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(options.shape, options.device)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for cache in ("empty", "full"):
            command = [sys.executable, __file__, "--shape", options.shape, "--device", options.device, "--child"]
            environment = {**os.environ, "HOME": home}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"shape": options.shape, "cache": cache, **json.loads(done.stdout.splitlines()[-1])})
            print({key: round(v, 2) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    if options.out:
        from record import header, write

        write(options.out, header(options.device, {}, "torch") | {"rows": rows})


if __name__ == "__main__":
    main()
