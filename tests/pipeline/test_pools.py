"""Who solves is not to be seen in the result: threads, a lane, processes and Ray write the same files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import builders
from milo.checkpoint.source import Checkpoint
from milo.checkpoint.writer import TensorWriter
from milo.errors import DeviceError, WeightError
from milo.integrations.transformers.source import open_source
from milo.pipeline import compress, job, work
from milo.pipeline.devices import visible_devices
from milo.pipeline.job import Job
from milo.pipeline.layout import lay_out_checkpoint
from milo.pipeline.planning import plan_source
from milo.pipeline.pools import Lane, ProcessPool
from milo.pipeline.schedule import cost, in_order
from milo.pipeline.work import Item, Stack, work_items
from milo.plan.recipe import custom_recipe
from milo.solve.stack import Solved

CHEAP = "forkserver"  # imports everything once for all tests, where spawned processes would do it each
set_forkserver_preload(["milo.pipeline.pools"])
KNOBS: dict[str, Any] = {"ranks": "dense:5+kurtosis:3", "rounds": 2, "max_shard_size": 30_000}


@pytest.fixture(scope="module")
def by_one_thread(mixtral_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    builders.compress(mixtral_folder, out, workers=1, **KNOBS)
    return builders.file_hashes(out)


def tiny_job(folder: Path, out: Path, kind: type[Job] = Job) -> tuple[Job, list[Item]]:
    """A job whose files are allocated, and its items."""
    source = open_source(str(folder))
    plan = plan_source(source, custom_recipe("rtn", source.checkpoint.config))
    writer = compress.FolderWriter(out, lay_out_checkpoint(source.checkpoint, source.inventory, plan))
    out.mkdir()
    writer.allocate()
    groups = {group.name: group for group in source.inventory.groups}
    made = kind(source.checkpoint, groups, plan, tuple(source.inventory.left), writer.place)
    return made, work_items(plan, dict.fromkeys(source.inventory.left, 1))


def test_a_lane_and_threads_write_the_same_files(
    mixtral_folder: Path, tmp_path: Path, by_one_thread: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.compress(mixtral_folder, tmp_path / "threads", workers=3, **KNOBS)
    assert builders.file_hashes(tmp_path / "threads") == by_one_thread
    monkeypatch.setattr(compress, "open_pool", lambda *args: Lane("cpu"))
    builders.compress(mixtral_folder, tmp_path / "lane", **KNOBS)
    assert builders.file_hashes(tmp_path / "lane") == by_one_thread


@pytest.mark.slow
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]], ids=["one", "two"])
def test_processes_write_the_same_files(
    devices: list[str],
    mixtral_folder: Path,
    tmp_path: Path,
    by_one_thread: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if len(devices) == 1:  # which open_pool would not start a process for
        monkeypatch.setattr(compress, "open_pool", lambda *args: ProcessPool(devices, CHEAP))
    builders.compress(mixtral_folder, tmp_path / "out", devices=devices, **KNOBS)
    assert builders.file_hashes(tmp_path / "out") == by_one_thread
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
def test_ray_writes_the_same_files_and_goes_on(
    mixtral_folder: Path, tmp_path: Path, by_one_thread: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        builders.compress(mixtral_folder, tmp_path / "out", ray=True, **KNOBS)
        assert builders.file_hashes(tmp_path / "out") == by_one_thread
        half = tmp_path / "half"
        with monkeypatch.context() as patch:
            patch.setattr(compress.Book, "settle", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                builders.compress(mixtral_folder, half, ray=True, **KNOBS)
        builders.compress(mixtral_folder, half, **KNOBS)
        assert builders.file_hashes(half) == by_one_thread
        damaged = nan_source(mixtral_folder, tmp_path)
        with pytest.raises(WeightError, match=r"w1 \(member 3.*NaN or Inf"):
            builders.compress(damaged, tmp_path / "nan", ray=True, ranks="none", rounds=1)
    finally:
        ray.shutdown()


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_asked_for_by_name(mixtral_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"--ray needs Ray: pip install 'milo-moe\[ray\]'"):
        builders.compress(mixtral_folder, tmp_path / "out", ray=True, **KNOBS)


def nan_source(folder: Path, tmp_path: Path) -> Path:
    source = builders.copied(folder, tmp_path / "nan_source")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    file = Checkpoint(source).tensors[name].file
    tensors = load_file(file)
    tensors[name][5, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return source


class DyingJob(Job):
    """Its process is killed at the first item of layer 1, as the system does when memory is short."""

    def solve(self, item: Item, stack: Stack | None, device: str) -> list[Solved]:
        if ".1." in item.row:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().solve(item, stack, device)


@pytest.mark.slow
def test_errors_and_deaths_of_a_worker_reach_the_user(mixtral_folder: Path, tmp_path: Path) -> None:
    for source, kind, error, words in (
        (nan_source(mixtral_folder, tmp_path), Job, WeightError, r"w1 \(member 3.*NaN or Inf"),
        (mixtral_folder, DyingJob, DeviceError, r"worker process on cpu ended with exit code -9 \(killed: out of"),
    ):
        made, items = tiny_job(source, tmp_path / kind.__name__, kind)
        pool = ProcessPool(["cpu"], CHEAP)
        try:
            pool.begin(made)
            with pytest.raises(error, match=words):
                list(pool.run(items))
        finally:
            pool.close()


ORPHANS = """
import sys, time
from pathlib import Path
from test_pools import tiny_job
from milo.pipeline.pools import ProcessPool
if __name__ == "__main__":
    job, items = tiny_job(Path(sys.argv[1]), Path(sys.argv[2]))
    pool = ProcessPool(["cpu"], "fork")
    pool.begin(job)
    print(next(pool.run(items)).peak.process, flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(mixtral_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(ORPHANS)
    command = [sys.executable, script, mixtral_folder, tmp_path / "out"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=builders.child_environment())
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    assert worker.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("tpu", "'tpu' is no device that MiLo solves on; write cpu, cuda"),
        ("meta", "'meta' is no device"),
        ("cuda:0,tpu:1", "'tpu:1' is no device"),
        ("cuda:99", "cuda:99 is not there"),
    ],
)
def test_devices_that_are_not_there_are_refused(choice: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=words):
        visible_devices(choice)


@pytest.mark.parametrize(
    ("choice", "gpus", "found"),
    [
        (None, 0, ("cpu",)),
        (None, 2, ("cuda:0", "cuda:1")),
        ("cuda", 2, ("cuda:0", "cuda:1")),
        ("cuda:1", 2, ("cuda:1",)),
        ("cuda:0, cuda:1", 2, ("cuda:0", "cuda:1")),
        (["cpu", "cpu"], 2, ("cpu", "cpu")),
    ],
)
def test_devices_by_name(
    choice: str | Sequence[str] | None, gpus: int, found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert visible_devices(choice) == found


def test_gpus_and_cpu_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="mixes GPUs and CPU"):
        visible_devices("cuda:0,cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="shows PyTorch 0 GPUs"):
        visible_devices("cuda")


def test_items_cover_everything_once_and_come_largest_first(
    mixtral_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(work.PIECE, "cpu", 2 * 96 * 64)
    monkeypatch.setattr(work, "COPIED", 20_000)
    source = open_source(str(mixtral_folder))
    plan = plan_source(source, custom_recipe("milo-s1", source.checkpoint.config, ranks="dense:20+kurtosis:3"))
    sizes = {name: source.checkpoint.tensors[name].nbytes for name in source.inventory.left}
    items = work_items(plan, sizes)
    assert [m for item in items if not item.row for m in item.members] == list(range(len(sizes)))
    assert len([item for item in items if not item.row]) == 2  # two vocabularies of 16 kB do not fit into one
    for row in plan.rows:
        assert [m for item in items if item.row == row.name for m in item.members] == list(range(len(row.ranks)))
    canary, *ordered = in_order(items, plan)
    assert {canary, *ordered} == set(items)
    assert len(ordered) == len(items) - 1
    assert [not item.row for item in ordered] == sorted((not item.row for item in ordered), reverse=True)
    costs = [cost(item, plan) for item in ordered if item.row]
    assert costs == sorted(costs, reverse=True)
    assert len(canary.members) * 96 * 64 == work.PIECE["cpu"]


def test_the_canary_sings_first(mixtral_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The item that needs most memory is the first to be solved and written."""
    events: list[tuple[str, str]] = []
    solve, put = job.solve_piece, TensorWriter.write

    def solving(weight: torch.Tensor, row: Any, *rest: Any) -> Any:
        events.append(("solve", row.name))
        return solve(weight, row, *rest)

    def writing(self: TensorWriter, name: str, tensor: torch.Tensor, first_row: int = 0) -> memoryview:
        events.append(("write", name))
        return put(self, name, tensor, first_row)

    monkeypatch.setattr(job, "solve_piece", solving)
    monkeypatch.setattr(TensorWriter, "write", writing)
    builders.compress(mixtral_folder, tmp_path / "out", workers=1, **KNOBS)
    kinds = [kind for kind, _ in events]
    second = kinds.index("solve", 1)
    assert ".experts.*." in events[0][1]
    assert set(kinds[1:second]) == {"write"}
    assert len(kinds[1:second]) >= 4 * 3
