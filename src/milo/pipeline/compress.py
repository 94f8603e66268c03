"""Compress a checkpoint folder: shard in, shard out, the model is never built.

Memory is bounded by the items in flight (`milo.pipeline.work`), not by the model; the plan is carried out blindly. A
run that ends early, however it ends, is continued by the same command (`milo.pipeline.journal`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import milo
from milo.checkpoint.compressed import FORMAT_VERSION, QUANT_METHOD, REPORT
from milo.checkpoint.fingerprint import fingerprint
from milo.checkpoint.inventory import Inventory, Kind
from milo.checkpoint.layout import Shard
from milo.checkpoint.source import INDEX, Checkpoint
from milo.checkpoint.writer import UNFINISHED, FolderWriter, check_output, explained
from milo.errors import CheckpointError
from milo.pipeline.book import Book, Progress
from milo.pipeline.card import inherited_metadata, model_card
from milo.pipeline.devices import open_pool, visible_devices
from milo.pipeline.job import Job, Measured
from milo.pipeline.journal import Journal
from milo.pipeline.layout import MAX_SHARD_SIZE, copied_spec, lay_out_checkpoint
from milo.pipeline.memory import Peak
from milo.pipeline.pools import Pool
from milo.pipeline.schedule import in_order
from milo.pipeline.work import left_over, work_items
from milo.plan.plan import Plan, Row
from milo.solve.stack import Solved

LOADING_NOTE = (
    "Compressed with MiLo. `pip install milo-moe`, then `import milo` BEFORE transformers' from_pretrained; without "
    "it transformers warns of an unknown quant_method and fills the experts with random numbers."
)


@dataclass(frozen=True)
class Compressed:
    """What a compression produced, and what this run of it took.

    Attributes:
        folder: the output.
        report: what `milo_report.json` holds.
        seconds: wall time.
        kept: compressed weights that an earlier run had finished.
        stages: seconds spent reading, solving and writing, summed over the workers.
        peak: memory, summed over the processes of this machine; of the GPU that took most.
    """

    folder: Path
    report: dict[str, Any]
    seconds: float
    kept: int
    stages: tuple[float, float, float]
    peak: Peak


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


def compress_checkpoint(
    source: Checkpoint,
    inventory: Inventory,
    plan: Plan,
    out: str | Path,
    *,
    base_model: str | None = None,
    command: str | None = None,
    importance: Mapping[str, torch.Tensor] | None = None,
    devices: str | Sequence[str] = "cpu",
    workers: int | None = None,
    ray: bool = False,
    pool: Pool | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = lambda done, total, name: None,
) -> Compressed:
    """Carry a plan out, or go on with it where an earlier run stopped.

    Args:
        source: the opened source.
        inventory: what it holds.
        plan: what to do.
        out: output folder; new, empty, or with an unfinished run of the same plan, source and shard size.
        base_model: name to record for the source.
        command: what the user typed, for the report.
        importance: of the in-features (`milo.plan.sensitivity`), where the plan was made with it. A run that goes on
            trusts it to be what it was: a plan's policy says where it came from, and its last bits do not matter.
        devices: where matrices are solved, see `milo.pipeline.devices.visible_devices`. Several GPUs get a process
            each, so a script that names them needs the usual `if __name__ == "__main__"`.
        workers: threads if the CPU solves; its cores by default.
        ray: solve on a Ray cluster instead.
        pool: what `open_pool` made of these three, if it was to get ready earlier. It serves this run only.
        max_shard_size: bytes a shard.
        overwrite: replace a finished output.
        restart: throw an unfinished run away.
        progress: see `Progress`.

    Raises:
        CheckpointError: unreadable source, output that holds something else, disk full.
        DeviceError: a device that is absent or has too little memory.
        WeightError: NaN or Inf in a matrix.
    """
    begin = time.perf_counter()
    out, devices = Path(out), visible_devices(devices)
    check_destination(source, out, overwrite)
    if ray:  # its workers have other working directories
        source, out = Checkpoint(source.folder.absolute()), out.absolute()
    shards = lay_out_checkpoint(source, inventory, plan, max_shard_size)
    writer = FolderWriter(out, shards)
    groups = {group.name: group for group in inventory.candidates}
    copied = {name: copied_spec(source, name).nbytes for name in inventory.kept(plan.by_name)}
    job = Job(source, groups, plan, tuple(copied), writer.place, importance or {})
    journal = _open_journal(writer, _header(source, plan, max_shard_size), restart)
    book = Book(job, journal, writer, progress)
    try:
        book.recover()
        kept = book.weights
        if left_over(work_items(plan, copied), book.done):
            with closing(pool or open_pool(devices, workers, ray)) as opened:
                opened.begin(job)
                items = left_over(work_items(plan, copied, opened.device), book.done)
                book.enter(opened.run(in_order(items, plan)))
        book.settle()
        seconds = time.perf_counter() - begin
        measured = book.matrices()
        matrices = [
            describe(row, member, measured[row.name, member]) for row in plan.rows for member in range(len(row.ranks))
        ]
        report = {**summary(plan, shards), "command": command, "seconds": round(seconds, 2), "matrices": matrices}
        config = {**source.config, "quantization_config": quantization_config(plan, base_model)}
        with explained(out):
            _copy_side_files(source.folder, out)
        card = model_card(config, report, base_model, inherited_metadata(source.folder))
        writer.finish({REPORT: json.dumps(report, indent=1), "README.md": card}, config)
    finally:
        book.close()
        journal.close()
    return Compressed(out, report, seconds, kept, book.stages, book.peak())


def check_destination(source: Checkpoint, out: Path, overwrite: bool) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        CheckpointError: it is the source itself (which `overwrite` would delete), or holds something else.
    """
    if out.resolve() == source.folder.resolve():
        raise CheckpointError(f"{out} is the source itself; choose another output folder")
    check_output(out, overwrite)


def _open_journal(writer: FolderWriter, header: Mapping[str, Any], restart: bool) -> Journal:
    """The journal of the run that is to be continued, or a new one; the folder is cleared of everything else."""
    resumed = (writer.folder / UNFINISHED).exists() and not restart
    if resumed:
        journal = Journal.resume(writer.folder, header)
    else:
        writer.check_space(keep=False)
        journal = Journal.begin(writer.folder, header)
    try:
        if resumed:
            writer.check_space(keep=True)
        writer.clear(keep=resumed)
    except BaseException:
        journal.close()
        raise
    return journal


def _header(source: Checkpoint, plan: Plan, max_shard_size: int) -> dict[str, Any]:
    """What a run is: only the same one may go on with its output."""
    return {
        "milo version": milo.__version__,
        "format version": FORMAT_VERSION,
        "plan": plan.digest,
        "recipe": plan.recipe,
        "shard size": max_shard_size,
        "source": fingerprint(source),
    }


def describe(row: Row, member: int, solved: Solved | Measured) -> dict[str, Any]:
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


def side_files(source: Path) -> list[Path]:
    """Tokenizer, generation config, licence, modelling code; weights in other formats stay behind."""
    found = []
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
        if path.is_file() and not weights and path.name not in ("config.json", "README.md", INDEX, REPORT):
            if path.name.startswith(".") or path.name.endswith(".index.json"):
                continue
            found.append(path)
    return found


def _copy_side_files(source: Path, out: Path) -> None:
    for path in side_files(source):
        shutil.copyfile(path, out / path.name)
