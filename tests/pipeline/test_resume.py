"""Going on: finished work is verified and kept, another run is refused with the remedy, damage is never trusted."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import builders
import milo
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.fingerprint import fingerprint
from milo.checkpoint.source import Checkpoint
from milo.checkpoint.writer import UNFINISHED, TensorWriter
from milo.errors import CheckpointError
from milo.integrations.transformers.source import open_source
from milo.pipeline import job, work
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.journal import Journal
from milo.pipeline.layout import lay_out_checkpoint
from milo.pipeline.planning import Source, plan_source
from milo.pipeline.work import Item
from milo.plan.plan import Plan
from milo.plan.recipe import custom_recipe

KNOBS: dict[str, Any] = {"ranks": "dense:4+kurtosis:2", "rounds": 1, "max_shard_size": 20_000, "workers": 1}
ITEMS = 14  # groups of the two-layer Mixtral: 8 attention matrices, 6 groups of experts


class Stop(Exception):
    """Ends a run."""


@pytest.fixture(scope="module")
def undisturbed(mixtral_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    builders.compress(mixtral_folder, out, **KNOBS)
    return builders.file_hashes(out)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the groups that are solved; `calls.limit` stops the run (a plain attribute of the list's subclass)."""

    class Calls(list[str]):
        limit = 10**9

    seen, solve = Calls(), job.solve_piece

    def counted(weight: torch.Tensor, row: Any, *rest: Any) -> Any:
        if len(seen) >= seen.limit:
            raise Stop
        seen.append(row.name)
        return solve(weight, row, *rest)

    monkeypatch.setattr(job, "solve_piece", counted)
    return seen


@pytest.fixture
def half(mixtral_folder: Path, tmp_path: Path, calls: Any) -> Path:
    """An output folder whose run stopped after nine of its groups."""
    stopped(calls, 9, mixtral_folder, tmp_path / "out")
    return tmp_path / "out"


def stopped(calls: Any, after: int, source: Path, out: Path, **knobs: Any) -> None:
    """A run that stops after some groups, with nothing going on any more."""
    calls.clear()
    calls.limit = after
    with pytest.raises(Stop):
        builders.compress(source, out, **(KNOBS | knobs))
    for thread in threading.enumerate():
        if thread.name.startswith("solve"):
            thread.join()  # a run that fails does not wait for it
    calls.clear()
    calls.limit = 10**9


def planned(folder: Path) -> tuple[Source, Plan]:
    source = open_source(str(folder))
    recipe = custom_recipe("milo-s1", source.checkpoint.config, ranks=KNOBS["ranks"], rounds=1)
    return source, plan_source(source, recipe)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / UNFINISHED).read_text().splitlines()]


def test_finished_groups_are_not_solved_again(
    half: Path, mixtral_folder: Path, calls: list[str], undisturbed: dict[str, str]
) -> None:
    finished = {entry["item"].rpartition("[")[0] for entry in lines(half)[1:]} - {""}
    assert len(finished) >= 8
    steps: list[int] = []
    source, plan = planned(mixtral_folder)
    result = compress_checkpoint(
        source.checkpoint, source.inventory, plan, half, max_shard_size=20_000, workers=1,
        progress=lambda done, total, name: steps.append(done),
    )  # fmt: skip
    assert set(calls) == plan.by_name.keys() - finished
    assert result.kept == sum(plan.by_name[name].parameters for name in finished)
    assert steps == sorted(steps)
    assert steps[0] == result.kept  # from where the time left is reckoned
    assert builders.file_hashes(half) == undisturbed


def test_another_kind_of_device_goes_on_with_items_of_its_own_size(
    mixtral_folder: Path, tmp_path: Path, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished stays, what is left even of a group in the middle is cut anew, and nothing is done twice."""
    two, three = 2 * 96 * 64, 3 * 96 * 64  # of the four experts
    monkeypatch.setitem(work.PIECE, "cpu", three)
    out = tmp_path / "out"
    stopped(calls, 5, mixtral_folder, out)
    first = [Item.of(entry["item"]) for entry in lines(out)[1:]]
    monkeypatch.setitem(work.PIECE, "cpu", two)
    builders.compress(mixtral_folder, out, **KNOBS)
    checkpoint = CompressedCheckpoint(out)
    names = [matrix["name"] for matrix in checkpoint.report["matrices"]]
    assert sorted(names) == sorted(name for row in checkpoint.plan.rows for name in row.matrices())
    assert all(0 < matrix["error"] < 0.3 for matrix in checkpoint.report["matrices"])
    rows = {row.name: len(row.ranks) for row in checkpoint.plan.rows}
    halved = [item.row for item in first if len(item.members) == 3]
    assert halved  # [0:3] is done, so that of [0:2] and [2:4] only 3 is left
    assert [calls.count(row) for row in halved] == [1 - first.count(Item(row, 3, 4)) for row in halved]
    untouched = [row for row in rows if row not in {item.row for item in first} and rows[row] == 4]
    assert [calls.count(row) for row in untouched] == [2] * len(untouched)


def test_what_two_kinds_of_device_claim_is_counted_once(
    half: Path, mixtral_folder: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes may stand in the journal twice, cut differently, if both kinds came to the same result."""
    source, plan = planned(mixtral_folder)
    whole = next(entry for entry in lines(half)[1:] if entry["item"].endswith("[0:4]"))
    row, entry = whole["item"].rpartition("[")[0], dict(whole)
    groups = {group.name: group for group in source.inventory.groups}
    shards = lay_out_checkpoint(source.checkpoint, source.inventory, plan, 20_000)
    place = TensorWriter(half, shards)
    probe = job.Job(source.checkpoint, groups, plan, tuple(source.inventory.left), place)
    digest = hashlib.sha256()
    for name, first_row, nbytes in probe.extent(Item(row, 0, 2)):
        for data in place.stored(name, first_row, nbytes):
            digest.update(data)
    journal = Journal(half)
    entry = {"item": f"{row}[0:2]", "sha256": digest.hexdigest(), "matrices": whole["matrices"][:2]}
    journal.append(entry)
    journal.close()
    builders.compress(mixtral_folder, half, **KNOBS)
    assert builders.file_hashes(half) == undisturbed


@pytest.mark.parametrize("where", ["part", "named"])
def test_bytes_that_changed_on_disk_are_solved_again(
    where: str, half: Path, mixtral_folder: Path, calls: list[str], undisturbed: dict[str, str]
) -> None:
    finished = {entry["item"].rpartition("[")[0] for entry in lines(half)[1:]}
    source, plan = planned(mixtral_folder)
    shards = lay_out_checkpoint(source.checkpoint, source.inventory, plan, 20_000)
    suffix = "" if where == "named" else ".part"
    row, file, offset = next(
        (row, half / (shard.file + suffix), shard.offsets[name])
        for shard in shards
        if (half / (shard.file + suffix)).exists()
        for name in shard.specs
        for row in finished
        if name == f"{row.replace('*', '0')}.weight_packed"
    )
    data = bytearray(file.read_bytes())
    data[offset + 5] ^= 1
    file.write_bytes(data)
    builders.compress(mixtral_folder, half, **KNOBS)
    assert row in calls
    assert len(calls) < ITEMS
    assert builders.file_hashes(half) == undisturbed


def test_a_shard_that_was_deleted_is_made_again(
    half: Path, mixtral_folder: Path, calls: list[str], undisturbed: dict[str, str]
) -> None:
    next(half.glob("*.safetensors")).unlink()
    builders.compress(mixtral_folder, half, **KNOBS)
    assert len(calls) < ITEMS
    assert builders.file_hashes(half) == undisturbed


def test_a_finished_run_that_died_before_it_removed_its_journal_solves_nothing(
    half: Path, mixtral_folder: Path, calls: list[str], undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        unlink = Path.unlink
        patch.setattr(
            Path, "unlink", lambda self, missing_ok=False: None if self.name == UNFINISHED else unlink(self, missing_ok)
        )
        builders.compress(mixtral_folder, half, **KNOBS)
    assert (half / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished"):
        CompressedCheckpoint(half)
    calls.clear()
    builders.compress(mixtral_folder, half, **KNOBS)
    assert calls == []
    assert builders.file_hashes(half) == undisturbed


def refused(words: str, source: Path, out: Path, **knobs: Any) -> None:
    """The run is refused with these words and a remedy, and not a byte of the folder changes."""
    before = builders.file_hashes(out)
    with pytest.raises(CheckpointError, match=words + r".*--restart") as caught:
        builders.compress(source, out, **(KNOBS | knobs))
    assert str(out) in str(caught.value)
    assert builders.file_hashes(out) == before


@pytest.mark.parametrize(
    ("words", "knobs"),
    [
        ("unfinished run of another kind \\(plan: .* then, .* now", {"ranks": "dense:4"}),
        ("shard size: 20000 then, 30000 now", {"max_shard_size": 30_000}),
        ("plan: ", {"rounds": 2}),
        ("plan: ", {"rounds": 2, "overwrite": True}),
    ],
)
def test_another_run_is_refused_and_restart_starts_over(
    words: str, knobs: dict[str, Any], half: Path, mixtral_folder: Path, tmp_path: Path, calls: list[str]
) -> None:
    refused(words, mixtral_folder, half, **knobs)
    assert calls == []
    builders.compress(mixtral_folder, half, restart=True, **(KNOBS | knobs | {"overwrite": False}))
    assert len(calls) == ITEMS
    builders.compress(mixtral_folder, tmp_path / "new", **(KNOBS | knobs))
    assert builders.file_hashes(half) == builders.file_hashes(tmp_path / "new")


def test_another_version_is_refused(half: Path, mixtral_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milo, "__version__", "9.9")
    refused(r"milo version: .* then, 9\.9 now", mixtral_folder, half)


def test_a_source_that_changed_is_refused_and_named(half: Path, mixtral_folder: Path, tmp_path: Path) -> None:
    changed = builders.copied(mixtral_folder, tmp_path / "changed")
    file = changed / "model-00002-of-00003.safetensors"
    save_file({n: t * 1.01 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    refused(r"source: model-00002-of-00003\.safetensors changed", changed, half)
    builders.edit_json(changed / "config.json", vocab_size=127)
    refused(r"source: config\.json, model-00002", changed, half)


def test_a_copy_of_the_source_is_the_source(half: Path, mixtral_folder: Path, tmp_path: Path, calls: list[str]) -> None:
    copy = builders.copied(mixtral_folder, tmp_path / "elsewhere")
    for file in copy.iterdir():
        file.touch()
    assert fingerprint(Checkpoint(copy)) == fingerprint(Checkpoint(mixtral_folder))
    builders.compress(copy, half, **KNOBS)
    assert 0 < len(calls) < ITEMS


def test_a_torn_last_line_is_dropped(
    half: Path, mixtral_folder: Path, calls: list[str], undisturbed: dict[str, str]
) -> None:
    journal = half / UNFINISHED
    text = journal.read_text()
    last = len(text.splitlines()[-1])
    journal.write_text(text[: -last // 2])
    builders.compress(mixtral_folder, half, **KNOBS)
    assert len(calls) == ITEMS - 9 + 1
    assert builders.file_hashes(half) == undisturbed


@pytest.mark.parametrize("line", [1, 2, 6])
@pytest.mark.parametrize("harm", ["flipped", "emptied", "no json"])
def test_a_damaged_journal_is_named_and_nothing_finished_is_lost(
    harm: str, line: int, half: Path, mixtral_folder: Path, undisturbed: dict[str, str]
) -> None:
    journal = half / UNFINISHED
    good = journal.read_text()
    damaged = good.splitlines()
    damaged[line - 1] = {
        "flipped": damaged[line - 1].replace('"', '"x', 1).replace('"x', '"', 1).replace("0", "1"),
        "emptied": "",
        "no json": damaged[line - 1][:-3],
    }[harm]
    journal.write_text("\n".join(damaged) + "\n")
    refused(rf"milo_journal\.jsonl is damaged in line {line}; nothing was touched", mixtral_folder, half)
    journal.write_text(good)  # from a backup
    builders.compress(mixtral_folder, half, **KNOBS)
    assert builders.file_hashes(half) == undisturbed


def test_two_runs_never_share_a_folder(half: Path, mixtral_folder: Path) -> None:
    other = Journal(half)
    for restart in (False, True):
        with pytest.raises(CheckpointError, match=r"another process is compressing into .*out; wait"):
            builders.compress(mixtral_folder, half, restart=restart, **KNOBS)
    other.close()
    builders.compress(mixtral_folder, half, **KNOBS)


def test_restart_does_not_replace_a_finished_output(mixtral_folder: Path, tmp_path: Path) -> None:
    builders.compress(mixtral_folder, tmp_path / "out", **KNOBS)
    with pytest.raises(CheckpointError, match=r"not empty.*--overwrite"):
        builders.compress(mixtral_folder, tmp_path / "out", restart=True, **KNOBS)


def test_an_interrupted_overwrite_goes_on(mixtral_folder: Path, tmp_path: Path, calls: Any) -> None:
    out = tmp_path / "out"
    builders.compress(mixtral_folder, out, "hqq", max_shard_size=25_000)
    stopped(calls, 7, mixtral_folder, out, overwrite=True)
    assert not (out / "config.json").exists()
    builders.compress(mixtral_folder, out, overwrite=True, **KNOBS)
    assert len(calls) == ITEMS - 7
    builders.compress(mixtral_folder, tmp_path / "new", **KNOBS)
    assert builders.file_hashes(out) == builders.file_hashes(tmp_path / "new")
