"""Writing: exact offsets before the first tensor, nothing half-written that looks finished, errors that say why."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from milo.checkpoint.layout import lay_out
from milo.checkpoint.source import INDEX, SINGLE, Checkpoint, read_header, read_metadata
from milo.checkpoint.writer import UNFINISHED, FolderWriter, check_output, write_atomically
from milo.errors import CheckpointError
from milo.format.matrix import DTYPE_BYTES, TensorSpec

TENSORS = {
    "a.weight_packed": torch.arange(12, dtype=torch.int32).reshape(4, 3),
    "a.weight_scale": torch.arange(4, dtype=torch.float16).reshape(4, 1),
    "b.codes": torch.arange(10, dtype=torch.uint8).reshape(5, 2),
    "c.scalar": torch.tensor(3.5),
    "d.bias": torch.arange(3, dtype=torch.bfloat16),
    "e.empty": torch.zeros(0, 4),
    "f.flags": torch.tensor([True, False]),
}
DTYPES = {
    torch.int32: "I32", torch.float16: "F16", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16",
    torch.bool: "BOOL",
}  # fmt: skip
SPECS = {name: TensorSpec(DTYPES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()}
UNITS = [[(n, s) for n, s in SPECS.items() if n.startswith("a.")], *([(n, s)] for n, s in SPECS.items() if n[0] > "a")]


def opened(folder: Path, units: Any = UNITS, max_shard_size: int = 10**9, overwrite: bool = False) -> FolderWriter:
    """A writer of an empty folder, marked as unfinished: what a run does before its first item."""
    check_output(folder, overwrite)
    writer = FolderWriter(folder, lay_out(units, max_shard_size, {"key": "value"}))
    writer.check_space(keep=False)
    (folder / UNFINISHED).write_text("")
    writer.clear(keep=False)
    writer.allocate()
    return writer


def put(writer: FolderWriter, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
    """Write and count, as a run does."""
    written = writer.place.write(name, tensor, first_row)
    assert bytes(written) == b"".join(writer.place.stored(name, first_row, len(written)))
    shard = writer.count(name, len(written))
    if shard is not None:
        writer.complete(shard)


def write_all(folder: Path, max_shard_size: int = 10**9, **options: Any) -> FolderWriter:
    writer = opened(folder, max_shard_size=max_shard_size, **options)
    for name, tensor in TENSORS.items():
        put(writer, name, tensor)
    return writer


@pytest.mark.parametrize("max_shard_size", [10**9, 60, 1])
def test_what_is_written_is_what_safetensors_and_milo_read(max_shard_size: int, tmp_path: Path) -> None:
    writer = write_all(tmp_path / "out", max_shard_size)
    writer.finish({"note.txt": "hello"}, {"model_type": "x"})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [shard.file for shard in writer.shards]
    assert [f.stat().st_size for f in files] == [shard.nbytes for shard in writer.shards]
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    checkpoint = Checkpoint(tmp_path / "out")  # checks the index, if there is one
    assert checkpoint.config == {"model_type": "x"}
    assert {read_metadata(file)["format"] for file in files} == {"pt"}
    assert {read_metadata(file)["key"] for file in files} == {"value"}
    assert (tmp_path / "out" / "note.txt").read_text() == "hello"
    left = {p.name for p in (tmp_path / "out").iterdir()} - {f.name for f in files}
    assert left == {"config.json", "note.txt"} | ({INDEX} if len(files) > 1 else set())
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS.values())


def test_a_single_shard_and_many_are_named_as_loaders_expect() -> None:
    assert [s.file for s in lay_out(UNITS, 10**9, {})] == [SINGLE]
    names = [s.file for s in lay_out(UNITS, 1, {})]
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) >= 5


@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(list(DTYPE_BYTES)), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 400),
)
def test_the_layout_keeps_units_together_wastes_nothing_and_aligns(
    shape: list[list[tuple[str, int, int]]], max_shard_size: int
) -> None:
    units = [
        [(f"{i}.{j}", TensorSpec(dtype, (a, b))) for j, (dtype, a, b) in enumerate(unit)]
        for i, unit in enumerate(shape)
    ]
    shards = lay_out(units, max_shard_size, {})
    place = {name: i for i, shard in enumerate(shards) for name in shard.specs}
    order = []
    for unit in units:
        assert len({place[name] for name, _ in unit}) == 1
        order.append(place[unit[0][0]])
    assert order == sorted(order)
    for shard in shards:
        size = sum(spec.nbytes for spec in shard.specs.values())
        assert shard.nbytes == len(shard.header) + size
        assert len(shard.header) % 8 == 0
        assert size <= max_shard_size or len({name.split(".")[0] for name in shard.specs}) == 1 or not size
        end = len(shard.header)
        for name, offset in sorted(shard.offsets.items(), key=lambda item: (item[1], shard.specs[item[0]].nbytes)):
            assert offset == end
            assert offset % DTYPE_BYTES[shard.specs[name].dtype] == 0
            end += shard.specs[name].nbytes


def test_rows_of_a_stack_may_come_in_any_order(tmp_path: Path) -> None:
    stack = torch.arange(24, dtype=torch.int32).reshape(4, 3, 2)
    writer = opened(tmp_path / "out", [[("s", TensorSpec("I32", (4, 3, 2)))]])
    put(writer, "s", stack[2:], first_row=2)
    assert not (tmp_path / "out" / SINGLE).exists()
    put(writer, "s", stack[:2])
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)["s"], stack)


def test_bytes_are_copied_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milo.checkpoint.writer._CHUNK", 5)
    save_file(TENSORS, tmp_path / "source.safetensors")
    writer = opened(tmp_path / "out", max_shard_size=60)
    for info in read_header(tmp_path / "source.safetensors"):
        chunks = list(writer.place.copy(info.name, info.file, info.begin, info.end))
        assert all(len(chunk) <= 5 for chunk in chunks)
        if shard := writer.count(info.name, sum(map(len, chunks))):
            writer.complete(shard)
    writer.finish({}, {})
    checkpoint = Checkpoint(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_shard_has_its_name_only_when_it_is_complete_and_config_comes_last(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = opened(out, max_shard_size=1)
    first, *others = TENSORS
    for name in others:
        put(writer, name, TENSORS[name])
    shard = writer.shards[0].file
    assert (out / (shard + ".part")).exists()
    assert not (out / shard).exists()
    with pytest.raises(ValueError, match=rf"1 shards were never finished, e.g. {shard}"):
        writer.finish({}, {})
    assert not (out / "config.json").exists()
    put(writer, first, TENSORS[first])
    assert (out / shard).exists()
    assert not (out / "config.json").exists()
    writer.finish({}, {})
    assert (out / "config.json").exists()
    assert not (out / UNFINISHED).exists()
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a.weight_scale", torch.zeros(4, 1)),
        ("a.weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
        ("a.weight_packed", torch.zeros(5, 3, dtype=torch.int32)),  # it would run into its neighbour
    ],
)
def test_a_tensor_that_is_not_what_was_laid_out_is_a_bug(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    writer = opened(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"{name}: .* is not what was laid out"):
        writer.place.write(name, tensor)


def test_a_folder_that_holds_something_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match=r"out is not empty; choose another output folder or pass --overwrite"):
        write_all(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"


def test_overwrite_replaces_weights_index_and_config_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_all(out, max_shard_size=1).finish({}, {"old": True})
    (out / "mine.txt").write_text("mine")
    write_all(out, overwrite=True).finish({}, {"new": True})
    assert {p.name for p in out.iterdir()} == {SINGLE, "config.json", "mine.txt"}
    assert Checkpoint(out).config == {"new": True}


def test_leftovers_of_another_layout_are_cleared_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = opened(out, max_shard_size=1)
    for name in list(TENSORS)[1:4]:
        put(writer, name, TENSORS[name])
    assert list(out.glob("*.safetensors"))
    assert list(out.glob("*.part"))
    write_all(out).finish({}, {})
    assert {p.name for p in out.iterdir()} == {SINGLE, "config.json"}


def continued(out: Path) -> FolderWriter:
    """A second writer over the same folder that was told of everything but `b.codes`."""
    writer = FolderWriter(out, lay_out(UNITS, 30, {"key": "value"}))
    writer.check_space(keep=True)
    writer.clear(keep=True)
    for name in TENSORS:
        if name != "b.codes":
            writer.count(name, SPECS[name].nbytes)
    writer.allocate()
    return writer


@pytest.mark.parametrize("harm", ["nothing", "named too early", "a shard is gone", "cut", "grown", "header"])
def test_what_lies_in_the_folder_is_kept_and_brought_into_shape(harm: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_all(out, max_shard_size=30)
    shard = next(s for s in lay_out(UNITS, 30, {"key": "value"}) if "b.codes" in s.specs)
    path = out / shard.file
    data = path.read_bytes()
    if harm == "nothing":
        path.rename(path.with_name(path.name + ".part"))
    elif harm == "a shard is gone":
        path.unlink()
    elif harm != "named too early":
        path.write_bytes({"cut": data[:-3], "grown": data + b"tail", "header": b"\0" * 8 + data[8:]}[harm])
    writer = continued(out)
    assert not path.exists()
    for name in shard.specs if harm in ("a shard is gone", "cut") else ("b.codes",):
        writer.place.write(name, TENSORS[name])
    whole = writer.count("b.codes", SPECS["b.codes"].nbytes)
    assert whole == shard
    writer.complete(whole)
    assert path.read_bytes() == data
    writer.finish({}, {})
    assert all(torch.equal(Checkpoint(out).read(name), tensor) for name, tensor in TENSORS.items())


def test_room_that_is_taken_already_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    big = [[("x", TensorSpec("U8", (1 << 20,)))]]
    writer = opened(out, big)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 21, 1 << 21, 4096))
    writer.check_space(keep=True)
    writer.check_space(keep=False)  # its own leftovers will be removed
    with pytest.raises(CheckpointError, match="4,096 free"):
        FolderWriter(tmp_path / "other", lay_out(big, 10**9, {})).check_space(keep=True)


def test_a_run_that_dies_while_it_writes_config_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    writer = write_all(out)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("milo.checkpoint.writer.write_atomically", full)
        with pytest.raises(CheckpointError, match=r"the disk of .*out is full"):
            writer.finish({}, {})
    assert not (out / "config.json").exists()
    assert (out / UNFINISHED).exists()
    write_all(out).finish({}, {})
    assert {p.name for p in out.iterdir()} == {SINGLE, "config.json"}


def test_a_disk_that_is_too_small_is_known_before_the_first_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"out needs [\d,]+ bytes but its disk has 10 free; free some or choose"):
        write_all(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(params=["posix_fallocate", "pwrite", "fsync"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that fills up when the file is allocated, while tensors are written, or when they are flushed."""
    real, room = getattr(os, request.param), 20 if request.param == "pwrite" else 0

    def full(file: int, data: Any = b"", *args: Any) -> int:
        nonlocal room
        if request.param == "pwrite" and bytes(data[8:9]) == b"{":  # a header
            return real(file, data, *args)
        room -= len(data) if request.param == "pwrite" else 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, *args)

    monkeypatch.setattr(os, request.param, full)
    with monkeypatch.context():
        yield


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_explained_and_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the disk of .*out is full; free some space and run the command again"):
        write_all(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / SINGLE).exists()
    assert (tmp_path / "out" / UNFINISHED).exists()


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/out: .*Not a directory"):
        write_all(tmp_path / "file" / "out")


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    write_atomically(path, "old")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
