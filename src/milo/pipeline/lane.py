"""One device kept busy: while it solves an item, the next is being read and the last is being written.

Three threads and two short queues. The reader fills page-locked memory, of at most `AHEAD` items; the calling thread
copies to the device and solves; the writer fetches the result on a stream of its own, hashes it and writes it. Every
queue is bounded, and so is the memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from milo.pipeline.job import Done, Job, on_device
from milo.pipeline.work import Item, Stack
from milo.solve.stack import Solved

AHEAD = 2  # items that have been read, the one that is being solved included
BEHIND = 2  # solved items that may wait for the disk
DEPTH = AHEAD + BEHIND + 1  # items that a lane holds at most, the one that is being written included

# Gives the next item. None means that there is none now, or, if the lane says that it is idle, none ever.
Take = Callable[[bool], Item | None]


def run_lane(job: Job, device: str, take: Take) -> Iterator[Done]:
    """Carry out what `take` gives, and yield what is finished, in order.

    Args:
        job: the compression.
        device: where to solve.
        take: see `Take`; called from the calling thread only.
    """
    on_gpu = device.startswith("cuda")
    stream = torch.cuda.Stream(device) if on_gpu else None

    def read(item: Item) -> tuple[Stack | None, float]:
        begin = time.perf_counter()
        return job.read(item, pinned=on_gpu), time.perf_counter() - begin

    def write(item: Item, solved: list[Solved], ready: torch.cuda.Event | None, reading: float, solving: float) -> Done:
        begin = time.perf_counter()
        if stream is not None and ready is not None:
            with on_device(device), torch.cuda.stream(stream):
                stream.wait_event(ready)
                sha256 = job.write(item, solved)
        else:
            sha256 = job.write(item, solved)
        return job.done(item, sha256, solved, (reading, solving, time.perf_counter() - begin), device)

    reader, writer = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "write")
    coming: deque[tuple[Item, Future[tuple[Stack | None, float]]]] = deque()
    leaving: deque[Future[Done]] = deque()
    try:
        while True:
            while len(coming) < AHEAD and (item := take(not coming and not leaving)) is not None:
                coming.append((item, reader.submit(read, item)))
            if coming:
                item, future = coming.popleft()
                stack, reading = future.result()
                del future  # which holds the stack as well
                begin = time.perf_counter()
                solved = job.solve(item, stack, device)
                del stack  # its page-locked memory is what the next item is read into
                ready = torch.cuda.current_stream(device).record_event() if on_gpu else None
                leaving.append(writer.submit(write, item, solved, ready, reading, time.perf_counter() - begin))
            elif not leaving:
                return
            while leaving and (leaving[0].done() or len(leaving) > BEHIND or not coming):
                yield leaving.popleft().result()
    finally:  # after an error nobody waits for what is being read, and nothing is written any more
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)
