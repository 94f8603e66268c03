"""Time one dense linear with its compensator, beside Humming, bf16 cuBLAS and the limit of the memory.

    python benchmarks/linear.py --out benchmarks/results/linear_h100.json

A shape is out-features x in-features. As in `moe.py`: medians of CUDA-graph replays over a ring of matrices that
together exceed L2 many times; `limit` counts all bytes of one matrix, compensator too. A peer that fails leaves null.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import torch
from campaign import Row, run
from humming_peer import FORMATS, Need, Product
from record import figures
from synthetic import random_matrix
from timing import attempt, graph_time

from milo import ops

PEERS = ("bf16", *FORMATS)
SHAPES = ("4096x4096", "4096x14336", "14336x4096")
RING_BYTES = 256e6  # of the 3-bit ring: several times any GPU's L2


def ring(n: int, k: int) -> int:
    """Matrices to go through."""
    return ceil(RING_BYTES / (n * k * 3.5 / 8))


def open_peer(label: str, n: int, k: int, options: argparse.Namespace) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """A ring of one peer's matrices, as functions of `x`."""
    if label == "bf16":
        weights = [torch.randn(n, k, device=options.device, dtype=torch.bfloat16) for _ in range(options.ring(n, k))]
        return [lambda x, w=weight: torch.nn.functional.linear(x, w) for weight in weights]
    products = [Product(label, n, k, 0, options.dtype, options.device) for _ in range(options.ring(n, k))]
    x = torch.randn(max(options.tokens), k, device=options.device, dtype=options.dtype)
    products[0].check(x, products[0].dense(x))
    return [product.dense for product in products]


def time_ring(functions: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> float:
    return graph_time([lambda function=function: function(x) for function in functions])


def measure(name: str, bandwidth: float, options: argparse.Namespace) -> list[Row]:
    """All rows of one shape."""
    n, k = map(int, name.split("x"))
    inputs = [torch.randn(tokens, k, device=options.device, dtype=options.dtype) for tokens in options.tokens]
    ours: dict[int, list[float]] = {}
    limits: dict[int, float] = {}
    for rank in dict.fromkeys((*options.ranks, 0)):
        matrices = [random_matrix(1, n, k, 1, rank, options.device) for _ in range(options.ring(n, k))]
        limits[rank] = matrices[0].nbytes / bandwidth
        functions = [lambda x, matrix=matrix: ops.linear(x, matrix) for matrix in matrices]
        ours[rank] = [time_ring(functions, x) for x in inputs]
        del matrices, functions
        torch.cuda.empty_cache()
    peers: dict[str, list[float | None]] = {label: [None] * len(inputs) for label in PEERS[:3]}
    for label in options.peers:
        opened = attempt(f"{label}: making matrices", lambda label=label: open_peer(label, n, k, options))
        if opened is not None:
            given = [x.bfloat16() for x in inputs] if label == "bf16" else inputs
            peers[label] = [
                attempt(f"{label} at {len(x)} tokens", lambda x=x, opened=opened: time_ring(opened, x)) for x in given
            ]
        del opened
        torch.cuda.empty_cache()
    return [
        {
            "shape": name,
            "tokens": tokens,
            "rank": rank,
            "ours_us": ours[rank][i],
            "ours_rank0_us": ours[0][i],
            **{f"{label}_us": times[i] for label, times in peers.items()},
            "limit_us": limits[rank],
            "limit_rank0_us": limits[0],
        }
        for i, tokens in enumerate(options.tokens)
        for rank in options.ranks
    ]


def line(row: Row) -> str:
    """A row for people."""
    return f"{row['shape']:11s} tokens {row['tokens']:3d} rank {row['rank']:4d}  {figures(row)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="out-features x in-features")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[512])
    parser.add_argument("--peers", nargs="*", default=["bf16", "humming_w3", "humming_w4"], choices=PEERS)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16", help="ours and Humming's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.device, options.dtype = torch.device(options.device), getattr(torch, options.dtype)
    options.ring = ring if options.device.type == "cuda" else lambda n, k: 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = [tuple(map(int, name.split("x"))) for name in options.shapes]
    wanted = [
        Need(label, n, k, 0, tokens)
        for label in options.peers
        if label in FORMATS
        for n, k in sizes
        for tokens in options.tokens
    ]
    run(options, {}, wanted, measure, line)


if __name__ == "__main__":
    main()
