"""Who solves the items: threads of this process, one lane for a GPU, or one process a device.

All pools do the same: `run` carries items out in any order and yields what is finished. Python's threads are enough
for the cores of a CPU, since PyTorch releases the interpreter while it computes. GPUs get a process each, because
the kernel launches of two of them would fight for one interpreter.

A pool exists before its job does: a worker process takes seconds to import PyTorch and to get its GPU ready, which
pass while the plan is made.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol, TypeVar

import torch

from milo.errors import DeviceError
from milo.format.matrix import Encoding
from milo.pipeline.job import Done, Job, on_device
from milo.pipeline.lane import DEPTH, run_lane
from milo.pipeline.work import Item, one_thread
from milo.solve.stack import solve_stack

A = TypeVar("A")
B = TypeVar("B")


class Pool(Protocol):
    """Something that carries out a job's items.

    Attributes:
        workers: items at a time.
        device: a device of the kind that solves.
    """

    workers: int
    device: str

    def begin(self, job: Job) -> None:
        """Say what `run` is about; once, and first."""
        ...

    def run(self, items: Iterable[Item]) -> Iterator[Done]:
        """Carry out items, starting them in the order given; yields each as it is finished."""
        ...

    def close(self) -> None:
        """Stop without waiting for items that are being solved; may be called twice."""
        ...


def solving_threads(workers: int) -> ThreadPoolExecutor:
    """Threads whose PyTorch operations have one thread each."""
    return ThreadPoolExecutor(workers, "solve", initializer=torch.set_num_threads, initargs=(1,))


def as_finished(pool: Executor, work: Callable[[A], B], items: Iterable[A], most: int) -> Iterator[B]:
    """Results in the order in which they are finished; at most `most` items are begun and not yet yielded."""
    waiting = iter(items)
    flying = {pool.submit(work, item) for item in islice(waiting, most)}
    while flying:
        finished, flying = wait(flying, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=_failed):  # what is finished is kept, even if something else has failed
            flying |= {pool.submit(work, item) for item in islice(waiting, 1)}
            yield future.result()


def _failed(future: Future[B]) -> bool:
    return future.exception() is not None


class ThreadPool:
    """CPU cores of this process, an item each.

    One more thread does all the writing. So `close` need not wait for items that are being solved, which may take a
    minute: once that thread has ended, nothing of this run can reach the folder any more.
    """

    device = "cpu"
    job: Job

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = solving_threads(workers)
        self._scribe = ThreadPoolExecutor(1, "write")

    def begin(self, job: Job) -> None:
        self.job = job

    def run(self, items: Iterable[Item]) -> Iterator[Done]:
        def carry(item: Item) -> Done:
            return self.job.carry(item, "cpu", self._scribe)

        with one_thread():
            yield from as_finished(self._pool, carry, items, 2 * self.workers)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._scribe.shutdown(wait=True, cancel_futures=True)


class Lane:
    """One GPU, driven by this process."""

    workers = 1
    job: Job

    def __init__(self, device: str) -> None:
        self.device = device

    def begin(self, job: Job) -> None:
        self.job = job

    def run(self, items: Iterable[Item]) -> Iterator[Done]:
        waiting = iter(items)
        with one_thread(), on_device(self.device):
            yield from run_lane(self.job, self.device, lambda idle: next(waiting, None))

    def close(self) -> None:
        pass


class ProcessPool:
    """One process a device, fed from one queue. Works with `["cpu", "cpu"]` too.

    Args:
        devices: one a process, all of one kind.
        start: how processes are started; only spawned ones may use a GPU that this process has looked at.
    """

    def __init__(self, devices: Sequence[str], start: str = "spawn") -> None:
        self.workers = len(devices)
        self.device = devices[0]
        self._lanes: list[tuple[Connection, BaseProcess, str]] = []
        context = get_context(start)
        with _interrupts_blocked():
            for device in devices:
                ours, theirs = context.Pipe()
                process = context.Process(  # type: ignore[attr-defined]
                    target=_serve, args=(theirs, device), name=f"milo {device}", daemon=True
                )
                process.start()
                theirs.close()
                self._lanes.append((ours, process, device))

    def begin(self, job: Job) -> None:
        for lane in self._lanes:
            _send(lane, job)

    def run(self, items: Iterable[Item]) -> Iterator[Done]:
        waiting = deque(items)
        held = {id(lane): 0 for lane in self._lanes}
        by_connection = {lane[0]: lane for lane in self._lanes}
        while True:
            for step in range(DEPTH):  # breadth first, so that a short queue is shared evenly
                for lane in self._lanes:
                    if waiting and held[id(lane)] == step:
                        _send(lane, waiting.popleft())
                        held[id(lane)] += 1
            if not any(held.values()):
                return
            for ready in connection.wait(list(by_connection)):
                lane = by_connection[ready]  # type: ignore[index]
                done = _receive(lane)
                held[id(lane)] -= 1
                yield done

    def close(self) -> None:
        for ours, process, _ in self._lanes:
            process.kill()  # what it was writing is in no journal
            ours.close()
        for _, process, _ in self._lanes:
            process.join()
        self._lanes.clear()


def _send(lane: tuple[Connection, BaseProcess, str], message: Job | Item) -> None:
    try:
        lane[0].send(message)
    except OSError:
        _receive(lane)  # the worker is gone; what it last said, if anything, tells why


def _receive(lane: tuple[Connection, BaseProcess, str]) -> Done:
    ours, process, device = lane
    try:
        answer = ours.recv()
    except (EOFError, OSError):
        process.join(5)
        killed = " (killed: out of memory?)" if process.exitcode == -signal.SIGKILL else ""
        raise DeviceError(
            f"the worker process on {device} ended with exit code {process.exitcode}{killed}; what was finished is "
            "kept, and the same command goes on from there"
        ) from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _serve(pipe: Connection, device: str) -> None:
    """The life of a worker process: a lane fed by a pipe, first with the job and then with its items."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    def take(idle: bool) -> Item | None:
        return pipe.recv() if idle or pipe.poll() else None

    try:
        with on_device(device):
            _get_ready(device)
            for done in run_lane(pipe.recv(), device, take):
                pipe.send(done)
    except EOFError:
        return
    except BaseException as error:
        error.add_note(f"in the worker process on {device}:\n{traceback.format_exc()}")
        pipe.send(error)
        os._exit(1)  # not before the parent has it; nobody waits for items that are being read


def _get_ready(device: str) -> None:
    """Make a GPU's context and load libraries and kernels, which the first item would wait for."""
    if device.startswith("cuda"):
        solve_stack(torch.randn(2, 64, 128, device=device), [8, 8], Encoding(), rounds=3)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which is the parent's business; the parent sees it afterwards."""
    caught: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number)) if in_main else None
    resource_tracker.ensure_running()  # it would be started with the first process, and lift the block
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _die_with_parent() -> None:
    """Ends this process when the parent is gone, however it went."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
