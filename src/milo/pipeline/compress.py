"""Compress a checkpoint folder: shard in, shard out, the model is never built.

Memory is bounded by one piece of work (`milo.pipeline.work`), not by the model; the plan is carried out blindly.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import milo
from milo.checkpoint.compressed import DIGEST_KEY, FORMAT_VERSION, QUANT_METHOD, REPORT
from milo.checkpoint.inventory import Inventory, Kind
from milo.checkpoint.source import INDEX, Checkpoint
from milo.checkpoint.writer import FolderWriter, Shard, Unit, check_output, explained, lay_out
from milo.errors import CheckpointError
from milo.format.matrix import TensorSpec
from milo.pipeline.card import inherited_metadata, model_card
from milo.pipeline.work import one_thread, pieces, read_members, solve_piece, worker_count
from milo.plan.plan import Plan, Row
from milo.solve.stack import Solved

MAX_SHARD_SIZE = 5_000_000_000
LOADING_NOTE = (
    "Compressed with MiLo. `pip install milo-moe`, then `import milo` BEFORE transformers' from_pretrained; without "
    "it transformers warns of an unknown quant_method and fills the experts with random numbers."
)

# Called with (compressed weights so far, all of them, the group at work).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Compressed:
    """What a compression produced.

    Attributes:
        folder: the output.
        report: what `milo_report.json` holds.
        seconds: wall time.
    """

    folder: Path
    report: dict[str, Any]
    seconds: float


def quantization_config(plan: Plan, base_model: str | None) -> dict[str, Any]:
    """The `quantization_config` of a compressed model's `config.json`."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "milo_version": milo.__version__,
        "base_model": base_model,
        "note": LOADING_NOTE,
        "plan_sha256": plan.digest,
        "plan": plan.to_json(),
    }


def lay_out_checkpoint(
    source: Checkpoint, inventory: Inventory, plan: Plan, max_shard_size: int = MAX_SHARD_SIZE
) -> list[Shard]:
    """The output's shards: copied tensors first, then the matrices in the plan's order."""
    units: list[Unit] = [[(name, copied_spec(source, name))] for name in inventory.left]
    for row in plan.rows:
        tensors = row.tensors()
        if row.kind is Kind.EXPERTS:
            by_matrix: dict[str, list[tuple[str, TensorSpec]]] = {name: [] for name in row.matrices()}
            for name, spec in tensors.items():
                by_matrix[name.rpartition(".")[0]].append((name, spec))
            units.extend(by_matrix.values())
        else:
            units.append(list(tensors.items()))
    return lay_out(units, max_shard_size, {DIGEST_KEY: plan.digest})


def copied_spec(source: Checkpoint, name: str) -> TensorSpec:
    """dtype and shape of a tensor that is not compressed; FP8 is written out as bfloat16."""
    info = source.tensors[name]
    return TensorSpec("BF16" if info.dtype == "F8_E4M3" else info.dtype, info.shape)


def compress_checkpoint(
    source: Checkpoint,
    inventory: Inventory,
    plan: Plan,
    out: str | Path,
    *,
    base_model: str | None = None,
    command: str | None = None,
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = lambda done, total, name: None,
) -> Compressed:
    """Carry a plan out.

    Args:
        source: the opened source.
        inventory: what it holds.
        plan: what to do.
        out: output folder; must not exist or be empty.
        base_model: name to record for the source.
        command: what the user typed, for the report.
        device: where matrices are solved.
        max_shard_size: bytes a shard.
        overwrite: replace an existing output.
        progress: see `Progress`.

    Raises:
        CheckpointError: unreadable source, output not empty, disk full.
        WeightError: NaN or Inf in a matrix.
    """
    check_destination(source, Path(out), overwrite)
    begin = time.perf_counter()
    shards = lay_out_checkpoint(source, inventory, plan, max_shard_size)
    writer = FolderWriter(Path(out), shards, overwrite)
    matrices: list[dict[str, Any]] = []
    try:
        for name in inventory.left:
            _copy(source, name, writer)
        done = 0
        progress(done, plan.parameters, "")
        for row, members, solved in _solve_all(source, inventory, plan, device):
            for member, result in zip(members, solved, strict=True):
                write_matrix(writer, row, member, result.tensors)
                matrices.append(describe(row, member, result))
            done += len(members) * row.shape[0] * row.shape[1]
            progress(done, plan.parameters, row.name)
        seconds = time.perf_counter() - begin
        report = {**summary(plan, shards), "command": command, "seconds": round(seconds, 2), "matrices": matrices}
        config = {**source.config, "quantization_config": quantization_config(plan, base_model)}
        with explained(Path(out)):
            _copy_side_files(source.folder, Path(out))
        card = model_card(config, report, base_model, inherited_metadata(source.folder))
        writer.finish({REPORT: json.dumps(report, indent=1), "README.md": card}, config)
    finally:
        writer.close()
    return Compressed(Path(out), report, seconds)


def _solve_all(
    source: Checkpoint, inventory: Inventory, plan: Plan, device: str
) -> Iterator[tuple[Row, range, list[Solved]]]:
    """Solve every piece, several at a time, and yield them in order; few are ever in flight, so memory is bounded."""
    groups = {group.name: group for group in inventory.groups}

    def solve(row: Row, members: range) -> list[Solved]:
        weight = read_members(source, groups[row.name], members).to(device)
        return solve_piece(weight, row, members, plan.rounds)

    work = ((row, members) for row in plan.rows for members in pieces(row))
    workers = worker_count(device)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    flying: deque[tuple[Row, range, Future[list[Solved]]]] = deque()
    with one_thread():
        try:
            for row, members in work:
                flying.append((row, members, pool.submit(solve, row, members)))
                if len(flying) > workers:
                    yield (first := flying.popleft())[0], first[1], first[2].result()
            while flying:
                yield (first := flying.popleft())[0], first[1], first[2].result()
        finally:  # after an error or Ctrl-C nobody waits for pieces that are being solved, and no other begins
            pool.shutdown(wait=False, cancel_futures=True)


def check_destination(source: Checkpoint, out: Path, overwrite: bool) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        CheckpointError: it is the source itself (which `overwrite` would delete), or holds something else.
    """
    if out.resolve() == source.folder.resolve():
        raise CheckpointError(f"{out} is the source itself; choose another output folder")
    check_output(out, overwrite)


def write_matrix(writer: FolderWriter, row: Row, member: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one solved matrix, into its place in the stack if it is part of one."""
    if row.kind is not Kind.STACK:
        prefix = row.matrices()[member]
        for suffix, tensor in tensors.items():
            writer.write(f"{prefix}.{suffix}", tensor)
        return
    for suffix, tensor in tensors.items():
        if suffix.startswith("lowrank"):
            writer.write(f"{row.name}.{suffix}", tensor, first_row=sum(row.ranks[:member]))
        else:
            writer.write(f"{row.name}.{suffix}", tensor[None], first_row=member)


def describe(row: Row, member: int, solved: Solved) -> dict[str, Any]:
    """One matrix's entry in the report."""
    return {
        "name": row.name.replace("*", str(member)) if row.kind is Kind.EXPERTS else row.name,
        **({"member": member} if row.kind is Kind.STACK else {}),
        "role": str(row.role),
        "shape": list(row.shape),
        "bits": row.encoding.bits,
        "group_size": row.encoding.group_size,
        "rank": row.ranks[member],
        "error": solved.error,
        "error_before_factor_rounding": solved.error_unrounded,
        "rounds": solved.rounds,
    }


def summary(plan: Plan, shards: list[Shard]) -> dict[str, Any]:
    """Totals of a plan and its output files."""
    return {
        "milo_version": milo.__version__,
        "recipe": plan.recipe,
        "policy": plan.policy,
        "plan_sha256": plan.digest,
        "compressed_weights": plan.parameters,
        "compressed_bytes": plan.nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "files_bytes": sum(shard.nbytes for shard in shards),
    }


def _copy(source: Checkpoint, name: str, writer: FolderWriter) -> None:
    info = source.tensors[name]
    if info.dtype == "F8_E4M3":
        writer.write(name, source.read(name))
    else:
        writer.copy(name, info.file, info.begin, info.end)


def _copy_side_files(source: Path, out: Path) -> None:
    """Tokenizer, generation config, licence, modelling code; weights in other formats stay behind."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
        if path.is_file() and not weights and path.name not in ("config.json", "README.md", INDEX, REPORT):
            if path.name.startswith(".") or path.name.endswith(".index.json"):
                continue
            shutil.copyfile(path, out / path.name)
