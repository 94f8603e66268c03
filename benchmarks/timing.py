"""Timing on a GPU: CUDA graphs over a ring of layers, medians, and the bandwidth that limits them.

On a CPU the same functions run the calls one by one, so that the scripts can be tested; such figures mean nothing.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]
WARM_UP_MS = 20.0  # of replays before the timed ones: clocks rise


def graph_time(calls: Sequence[Call], repeats: int = 20) -> float:
    """Microseconds of one call: the median of `repeats` replays of a graph that holds all of them, one after another.

    The calls go through distinct weights that together exceed L2 many times, so that each finds its own in memory.
    """
    if not torch.cuda.is_available():
        return median(_seconds(calls) for _ in range(2)) / len(calls) * 1e6
    torch.cuda.synchronize()  # what the calls read is written on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    warm = 0.0
    while warm < WARM_UP_MS:
        warm += _replay_ms(graph)
    return median(_replay_ms(graph) for _ in range(repeats)) / len(calls) * 1e3


def read_bandwidth(device: torch.device) -> float:
    """Bytes a microsecond that a reduction over 2 GiB reads."""
    count = 1 << (29 if device.type == "cuda" else 20)
    data = torch.empty(count, dtype=torch.int32, device=device).random_()
    return data.nbytes / graph_time([lambda: torch.sum(data, dtype=torch.int32)])


def attempt(label: str, function: Callable[[], T]) -> T | None:
    """The function's value; None if it fails, with the traceback printed: one peer's failure is not the run's."""
    try:
        return function()
    except Exception:  # whatever a foreign package raises
        print(f"{label} failed:\n{traceback.format_exc()}", flush=True)
        return None


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _seconds(calls: Sequence[Call]) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin
