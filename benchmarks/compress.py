"""Compression end to end, from a disk to the same disk, against what disk and solver allow.

    python benchmarks/compress.py --gigabytes 8 --folder /scratch --devices cuda:0 --devices cuda:0,cuda:1
    python benchmarks/compress.py --gigabytes 0.05 --folder /tmp --devices cpu --recipe hqq

Makes a Mixtral-shaped checkpoint of about the size asked for (real shapes from 3 GB up, halved ones below), measures
the disk by writing, evicting and reading a file, and compresses with each set of devices in a process of its own,
the source evicted from the system's cache first. `ratio` is the time over the longer of (source bytes / read rate +
output bytes / write rate) and (solving seconds / workers): what a perfect overlap would take.

A run that the disk sets the pace of is as fast on one GPU as on two. How solving scales is seen where there is much to
solve and nothing to wait for:

    python benchmarks/compress.py --gigabytes 16 --rounds 80 --cached --folder /scratch --devices cuda:0 \
        --devices cuda:0,cuda:1

`seconds` is `compress_checkpoint`; worker processes start before the plan is made, as in `milo quantize`, and
`total_s` is everything from there on, planning and prediction included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from milo.checkpoint.layout import lay_out
from milo.checkpoint.source import Checkpoint
from milo.checkpoint.writer import FolderWriter
from milo.format.matrix import TensorSpec
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.devices import open_pool, visible_devices
from milo.pipeline.planning import Source, plan_source
from milo.pipeline.predict import predict
from milo.pipeline.work import pieces
from milo.plan.recipe import PRESETS, custom_recipe

BYTES = 2  # of a source weight, bfloat16
CHUNK = 1 << 24


def shapes_of(gigabytes: float) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """A Mixtral of about this size: its tensors and its config."""
    hidden = 4096
    while layer_bytes(hidden) > gigabytes * 1e9 and hidden > 256:
        hidden //= 2
    layers = max(1, round(gigabytes * 1e9 / layer_bytes(hidden)))
    inter, kv, vocab = hidden * 7 // 2, hidden // 4, 8 * hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (8, hidden)
        for e in range(8):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.w1.weight": (inter, hidden), f"{expert}.w3.weight": (inter, hidden)}
            shapes[f"{expert}.w2.weight"] = (hidden, inter)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": hidden,
              "intermediate_size": inter, "num_hidden_layers": layers, "num_local_experts": 8}  # fmt: skip
    return shapes, config


def layer_bytes(hidden: int) -> int:
    return BYTES * (hidden * hidden * 5 // 2 + 8 * 3 * hidden * hidden * 7 // 2)


def make(folder: Path, gigabytes: float) -> None:
    """Write the checkpoint: windows of two pools of numbers, normal ones and heavy-tailed ones."""
    shapes, config = shapes_of(gigabytes)
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
    writer = FolderWriter(folder, lay_out([[item] for item in specs.items()], 5_000_000_000, {}))
    writer.check_space(keep=False)
    writer.allocate()
    largest = max(map(prod, shapes.values()))
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(largest * 5 // 4, generator=generator)
    tails = torch.randn(4, normal.numel(), generator=generator).square().mean(0).sqrt_()
    pools = [(0.02 * normal).bfloat16(), (0.02 * normal / tails).bfloat16()]  # Student's t with 4 degrees of freedom
    for number, (name, shape) in enumerate(shapes.items()):
        pool = pools[number % 3 == 0]
        first = int(torch.randint(0, pool.numel() - prod(shape) + 1, (), generator=generator))
        writer.place.write(name, pool[first : first + prod(shape)].view(shape))
        whole = writer.count(name, specs[name].nbytes)
        if whole is not None:
            writer.complete(whole)
    writer.finish({}, config)


def disk_rates(folder: Path, nbytes: int) -> dict[str, float]:
    """Bytes a second of writing a file through to the disk, and of reading it back from there."""
    path = folder / "rate.bin"
    chunk = torch.randint(0, 256, (CHUNK,), dtype=torch.uint8).numpy().tobytes()
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(max(1, nbytes // CHUNK)):
            stream.write(chunk)
        os.fsync(stream.fileno())
    written = time.perf_counter() - begin
    evict(path)
    size, buffer = path.stat().st_size, bytearray(CHUNK)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    read = time.perf_counter() - begin
    path.unlink()
    return {"read": size / read, "write": size / written, "bytes": size}


def evict(path: Path) -> None:
    """Drop a file from the system's cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(
    model: Path, out: Path, recipe: str, rounds: int | None, devices: str, workers: int | None, cached: bool
) -> dict[str, Any]:
    """One compression; what it took and what was predicted."""
    source = Source.of(Checkpoint(model), None)
    where = visible_devices(devices)
    begin = time.perf_counter()
    with closing(open_pool(where, workers)) as pool:
        plan = plan_source(source, custom_recipe(recipe, source.checkpoint.config, rounds=rounds))
        planned = time.perf_counter()
        told = predict(source.checkpoint, plan, where, workers)
        predicted = time.perf_counter()
        for file in model.glob("*.safetensors"):
            if not cached:
                evict(file)
        done = compress_checkpoint(source.checkpoint, source.inventory, plan, out, pool=pool)
        total = time.perf_counter() - begin
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        with file.open("rb") as stream:
            while data := stream.read(CHUNK):
                digest.update(data)
    stack = max(len(members) * prod(row.shape) for row in plan.rows for members in pieces(row, where[0]))
    return {
        "devices": list(where),
        "workers": told.workers,
        "recipe": recipe,
        "rounds": plan.rounds,
        "rank_sum": sum(sum(row.ranks) for row in plan.rows),
        "parameters": plan.parameters,
        "largest_stack_bytes": BYTES * stack,
        "seconds": done.seconds,
        "plan_s": planned - begin,
        "predict_s": predicted - planned,
        "total_s": total,
        "cached": cached,
        "stages_s": dict(zip(("read", "solve", "write"), done.stages, strict=True)),
        "solve_s_per_billion": done.stages[1] / plan.parameters * 1e9,
        "output_bytes": done.report["files_bytes"],
        "peak_host_bytes": done.peak.host,
        "peak_gpu_bytes": done.peak.gpu,
        "predicted": told.to_json(),
        "mean_error": sum(m["error"] for m in done.report["matrices"]) / len(done.report["matrices"]),
        "tensors_sha256": digest.hexdigest(),
    }


def device_name(devices: list[str]) -> str:
    if devices[0] != "cpu":
        return torch.cuda.get_device_name(devices[0])
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a process of its own, whose memory is its own as well."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; needs 1.4× the size")
    parser.add_argument("--devices", action="append", help="one run for each time it is given")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--recipe", default="milo-s1", choices=list(PRESETS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--cached", action="store_true", help="do not evict the source before a run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process: quicker, but peak memory says nothing")
    args = parser.parse_args(arguments)
    call = here if args.here else elsewhere

    args.folder.mkdir(parents=True, exist_ok=True)
    model, out = args.folder / "source", args.folder / "out"
    shutil.rmtree(model, ignore_errors=True)
    call(make, model, args.gigabytes)
    nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    disk = disk_rates(args.folder, min(nbytes // 2, 2 << 30))
    runs = []
    for devices in args.devices or [",".join(visible_devices())]:
        shutil.rmtree(out, ignore_errors=True)
        row = call(run, model, out, args.recipe, args.rounds, devices, args.workers, args.cached)
        moving = nbytes / disk["read"] + row["output_bytes"] / disk["write"]
        solving = row["stages_s"]["solve"] / row["workers"]
        row |= {"device": device_name(row["devices"]), "disk_s": moving, "solve_s": solving}
        row["ratio"] = row["seconds"] / max(moving, solving)
        runs.append(row)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    shutil.rmtree(model)
    shutil.rmtree(out)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    result = {"source_bytes": nbytes, "disk": disk, "versions": versions, "runs": runs}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
