"""Choosing the number of CPU threads by trial.

PyTorch takes one thread a core. For a small model that can be far too many: each of its thousands of small
operations waits for its slowest thread, so on a machine with many cores, or with cores busy elsewhere, fewer threads
are faster; with one of two cores busy, we measured two threads ten times slower than one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# A trial this many times slower than the best so far is not given another chance.
_HOPELESS = 1.5


@contextmanager
def fastest_threads(trial: Callable[[], object]) -> Iterator[int]:
    """Runs its body with the number of PyTorch threads that runs ``trial`` fastest.

    Tries 1, 2, 4, … up to the present number, and stops at the first that is slower than the one before. The number
    is put back at the end.

    Args:
        trial: A piece of the work to come; called several times, so it must not change anything.

    Yields:
        The number of threads chosen.
    """
    before = torch.get_num_threads()
    try:
        chosen, best = 1, float("inf")
        torch.set_num_threads(1)
        trial()  # the first call pays for allocations and lazy initialisation
        for count in _doublings(before):
            torch.set_num_threads(count)
            seconds = _seconds(trial)
            if seconds < _HOPELESS * best:
                seconds = min(seconds, _seconds(trial))
            if seconds >= best:
                break
            chosen, best = count, seconds
        torch.set_num_threads(chosen)
        yield chosen
    finally:
        torch.set_num_threads(before)


def _doublings(last: int) -> Iterator[int]:
    """Yields 1, 2, 4, … below ``last``, and ``last``."""
    count = 1
    while count < last:
        yield count
        count *= 2
    yield last


def _seconds(trial: Callable[[], object]) -> float:
    begin = time.perf_counter()
    trial()
    return time.perf_counter() - begin
