"""The same items as Ray tasks, on all machines of a cluster that share the source's and the output's disk.

The driver keeps the journal and gives shards their names; a task reads, solves and writes one item in place, on one
GPU if the cluster has any and on one core otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from milo.errors import DeviceError, MiloError
from milo.pipeline.job import Done, Job
from milo.pipeline.work import Item, one_thread


class RayPool:
    """A Ray cluster: the one that `ray.init` finds (the present session's, `RAY_ADDRESS`), or a new local one.

    Raises:
        DeviceError: Ray is not installed.
    """

    def __init__(self) -> None:
        try:
            ray: Any = import_module("ray")
        except ImportError:
            raise DeviceError("--ray needs Ray: pip install 'milo-moe[ray]'") from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        self.workers = gpus or int(have["CPU"])
        self.device = "cuda:0" if gpus else "cpu"  # Ray shows a task its own GPU only
        share = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        self._task = ray.remote(**share)(_carry)
        self._job: Any = None
        self._flying: list[Any] = []

    def begin(self, job: Job) -> None:
        self._job = self._ray.put(job)

    def run(self, items: Iterable[Item]) -> Iterator[Done]:
        waiting = iter(items)
        while True:
            while len(self._flying) < 2 * self.workers and (item := next(waiting, None)) is not None:
                self._flying.append(self._task.remote(self._job, item, self.device))
            if not self._flying:
                return
            finished, self._flying = self._ray.wait(self._flying)
            for reference in finished:
                yield self._get(reference)

    def close(self) -> None:
        for reference in self._flying:
            self._ray.cancel(reference, force=True)
        self._flying = []
        if self._ours:
            self._ray.shutdown()

    def _get(self, reference: Any) -> Done:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, MiloError) else error  # noqa: B904 - Ray's wrapper says nothing more
        except self._ray.exceptions.RayError as error:
            raise DeviceError(
                f"a Ray task was lost ({error}); what was finished is kept, and the same command goes on from there"
            ) from error


def _carry(job: Job, item: Item, device: str) -> Done:
    with one_thread():
        return job.carry(item, device)
