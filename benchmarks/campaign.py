"""What the kernel benchmarks do around their measurements: compile ahead, go shape by shape, keep what is found."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import humming_peer
import synthetic
import torch
from humming_peer import FORMATS, Need
from record import header, write
from timing import read_bandwidth

Row = dict[str, Any]


def run(
    options: argparse.Namespace,
    more: Mapping[str, Any],
    wanted: Sequence[Need],
    measure: Callable[[str, float, argparse.Namespace], list[Row]],
    line: Callable[[Row], str],
) -> None:
    """Measure every shape and write all rows after each.

    Args:
        options: with `device`, `dtype`, `peers`, `shapes` and `out`.
        more: settings for the JSON.
        wanted: the products that Humming is to multiply.
        measure: the rows of a shape, at so many bytes a microsecond.
        line: a row for people.
    """
    torch.manual_seed(0)
    gc.freeze()  # every capture collects garbage, which need not go through all that was imported
    begin = time.perf_counter()
    bandwidth = read_bandwidth(options.device)
    settings = {"read_tb_s": bandwidth / 1e6, "dtype": str(options.dtype).removeprefix("torch."), **more}
    result = header(options.device, settings, "torch") | {"peers": {p: FORMATS.get(p) for p in options.peers}}
    print(f"{result['device']}, read {bandwidth / 1e6:.2f} TB/s; microseconds", flush=True)
    synthetic.compile_ahead(options.dtype, options.device)
    humming_peer.compile_ahead(wanted, options.dtype, options.device)
    print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    rows: list[Row] = []
    for name in options.shapes:
        new = measure(name, bandwidth, options)
        rows += new
        print(*map(line, new), f"{name}: done after {time.perf_counter() - begin:.0f} s", sep="\n", flush=True)
        if options.out:  # after every shape, so that a run that is cut off leaves what it has
            write(options.out, result | {"complete": name == options.shapes[-1], "rows": rows})
