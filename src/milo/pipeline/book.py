"""The account of a run: which items are done, here in memory, in the journal and in the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from milo.checkpoint.layout import Shard
from milo.checkpoint.writer import FolderWriter
from milo.pipeline.job import Done, Job, Measured
from milo.pipeline.journal import Journal
from milo.pipeline.memory import Peak
from milo.pipeline.work import Item, left_over, worker_count

# Called with (compressed weights so far, all of them, the group that was just finished).
Progress = Callable[[int, int, str], None]


class Book:
    """Keeps account of a run.

    Args:
        job: the compression.
        journal: open.
        writer: of the same folder.
        progress: see `Progress`.

    Attributes:
        done: finished items.
        weights: compressed weights in them.
        stages: seconds that this run spent reading, solving and writing, summed over the workers.
    """

    def __init__(self, job: Job, journal: Journal, writer: FolderWriter, progress: Progress) -> None:
        self.job = job
        self.journal = journal
        self.writer = writer
        self.progress = progress
        self.done: dict[Item, Done] = {}
        self.weights = 0
        self.stages = (0.0, 0.0, 0.0)
        self._peaks: dict[int, Peak] = {}
        self._flusher = ThreadPoolExecutor(1, "flush")  # a shard's flush may take seconds: workers are not kept waiting
        self._flushing: list[Future[None]] = []

    def recover(self) -> None:
        """Take over what the journal has and the disk confirms, and allocate the rest."""
        claimed = {entry["item"]: Done.from_journal(Item.of(entry["item"]), entry) for entry in self.journal.entries}
        whole: list[Shard] = []
        with ThreadPoolExecutor(worker_count("cpu"), "verify") as pool:
            for done, stored in zip(claimed.values(), pool.map(self.job.is_stored, claimed.values()), strict=True):
                # A run that another kind of device went on with may have claimed bytes twice, cut differently.
                if stored and left_over([done.item], self.done) == [done.item]:
                    whole += self._count(done)
        self.writer.allocate()
        self._complete(whole)
        self.progress(self.weights, self.job.plan.parameters, "")

    def enter(self, finished: Iterable[Done]) -> None:
        """Write down items as they are finished."""
        for done in finished:
            self.journal.append(done.to_journal())
            self.stages = tuple(a + b for a, b in zip(self.stages, done.seconds, strict=True))  # type: ignore[assignment]
            if done.peak is not None:
                self._peaks[done.peak.process] = done.peak
            self._complete(self._count(done))
            self.progress(self.weights, self.job.plan.parameters, done.item.row)

    def settle(self) -> None:
        """Wait until every shard has its name."""
        for future in self._flushing:
            future.result()

    def matrices(self) -> dict[tuple[str, int], Measured]:
        """What was measured of every solved matrix, by row and member."""
        return {
            (item.row, member): measured
            for item, done in self.done.items()
            for member, measured in zip(item.members, done.matrices, strict=bool(item.row))
        }

    def close(self) -> None:
        """Let go; shards that wait for their names get them in the next run."""
        self._flusher.shutdown(wait=True, cancel_futures=True)

    def peak(self) -> Peak:
        """Memory of all processes of this run."""
        here = Peak.now()
        hosts = {process: peak.host for process, peak in self._peaks.items()} | {here.process: here.host}
        return Peak(here.process, sum(hosts.values()), max((peak.gpu for peak in self._peaks.values()), default=0))

    def _count(self, done: Done) -> list[Shard]:
        """Count an item's bytes; returns the shards that are whole now."""
        self.done[done.item] = done
        counted = [self.writer.count(name, nbytes) for name, _, nbytes in self.job.extent(done.item)]
        self.weights += self.job.weights(done.item)
        return [shard for shard in counted if shard is not None]

    def _complete(self, shards: Iterable[Shard]) -> None:
        def complete(shard: Shard) -> None:
            self.writer.complete(shard)
            self.journal.flush()

        self._flushing += [self._flusher.submit(complete, shard) for shard in shards]
