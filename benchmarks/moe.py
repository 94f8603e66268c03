"""Time a whole MoE FFN with its compensators, beside bf16 grouped GEMM and the limit of the memory.

    python benchmarks/moe.py [--tokens 1 8 64] [--ranks 32] [--out benchmarks/results/moe_h100.json]

Every figure is the median of CUDA-graph replays over a ring of distinct layers that together exceed L2 many times.
`limit` is the bytes of the touched experts (codes, metadata, compensators) over the read bandwidth measured in the
same run. bf16 is `torch._grouped_mm` for the two products alone, on tokens already sorted: no activation, no sum.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from milo import ops
from milo.kernels.layout import PackedMatrix

Layer = tuple[PackedMatrix, PackedMatrix]
SHAPES = {  # hidden, intermediate, experts, choices a token
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "deepseek-moe-16b": (2048, 1408, 64, 6),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}


def graph_time(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median microseconds of one call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return sorted(times)[len(times) // 2]


def read_bandwidth() -> float:
    """Bytes a microsecond that a reduction over 2 GiB reads."""
    data = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    return data.nbytes / graph_time([lambda: torch.sum(data, dtype=torch.int32)])


def random_matrix(experts: int, n: int, k: int, parts: int, rank: int) -> PackedMatrix:
    """Random codes in the kernels' layout, where every bit pattern is valid."""
    rows, tiles = -(-n // (64 // parts)), -(-k // 64)
    steps = -(-rank // 16)
    v_tiles = -(-steps * 16 * parts // 64)

    def words(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device="cuda").random_(-(2**31), 2**31 - 1)

    def halves(*size: int) -> torch.Tensor:
        return torch.rand(size, device="cuda").add_(0.5).mul_(0.4 / k**0.5).half()

    def meta(*size: int, zero: float) -> torch.Tensor:
        scale = halves(*size)
        return torch.stack([scale, torch.full_like(scale, zero)], -1)

    table = [[e * v_tiles, v_tiles, e * rows * steps, steps] for e in range(experts)]
    return PackedMatrix(
        codes=words(experts, rows, tiles, 3, 32, 4),
        meta=meta(experts, rows, tiles, 8, 8, zero=3.5),
        u_codes=words(experts * rows * steps, 3, 32),
        u_scales=halves(experts * rows * steps, parts, 16),
        v_codes=words(experts * v_tiles, tiles, 3, 32, 4),
        v_meta=meta(experts * v_tiles, tiles, 8, 8, zero=4.0),
        table=torch.tensor(table, dtype=torch.int32, device="cuda"),
        out_features=n,
        in_features=k,
        bits=3,
        group_size=64,
        parts=parts,
        v_row_tiles=v_tiles,
    )


def random_layers(shape: tuple[int, int, int, int], rank: int) -> list[Layer]:
    """A ring of layers, enough of them to miss L2 at one token."""
    hidden, inner, experts, _ = shape
    ring = 2 if hidden * inner * experts > 1e8 else 8
    return [
        (random_matrix(experts, inner, hidden, 2, rank), random_matrix(experts, hidden, inner, 1, rank))
        for _ in range(ring)
    ]


def route(tokens: int, experts: int, topk: int) -> torch.Tensor:
    return torch.rand(tokens, experts, device="cuda").topk(topk, 1).indices


def touched_bytes(layers: list[Layer], ids: list[torch.Tensor]) -> float:
    """Mean over the ring of the bytes that a call cannot avoid to read."""
    experts = layers[0][0].codes.shape[0]
    sizes = [sum(m.nbytes for m in layer) / experts for layer in layers]
    return sum(size * i.unique().numel() for size, i in zip(sizes, ids, strict=True)) / len(ids)


def time_bf16(shape: tuple[int, int, int, int], tokens: int, ids: list[torch.Tensor]) -> float:
    hidden, inner, experts, topk = shape
    first = [torch.randn(experts, hidden, 2 * inner, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    second = [torch.randn(experts, inner, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    calls = []
    for i in range(2):
        ends = torch.bincount(ids[i].flatten(), minlength=experts).cumsum(0).int()
        x = torch.randn(tokens * topk, hidden, device="cuda", dtype=torch.bfloat16)
        h = torch.randn(tokens * topk, inner, device="cuda", dtype=torch.bfloat16)

        def call(i: int = i, x: torch.Tensor = x, h: torch.Tensor = h, ends: torch.Tensor = ends) -> None:
            torch._grouped_mm(x, first[i], offs=ends)
            torch._grouped_mm(h, second[i], offs=ends)

        calls.append(call)
    return graph_time(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a whole MoE FFN.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--no-bf16", action="store_true", help="leave the bf16 baseline out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    rows = []
    print(f"{torch.cuda.get_device_name()}, read {bandwidth / 1e6:.2f} TB/s; microseconds")
    for name in options.shapes:
        hidden, _, experts, topk = SHAPES[name]
        ids = {t: [route(t, experts, topk) for _ in range(8)] for t in options.tokens}
        timed: dict[tuple[int, int], float] = {}
        limits: dict[tuple[int, int], float] = {}
        for rank in (*options.ranks, 0):
            layers = random_layers(SHAPES[name], rank)
            for tokens in options.tokens:
                x = torch.randn(tokens, hidden, device="cuda", dtype=torch.float16)
                weights = torch.rand(tokens, topk, device="cuda")
                routes = ids[tokens][: len(layers)]
                calls = [
                    lambda layer=layer, i=i, x=x, w=weights: ops.moe_ffn(x, *layer, i, w)
                    for layer, i in zip(layers, routes, strict=True)
                ]
                timed[rank, tokens] = graph_time(calls)
                limits[rank, tokens] = touched_bytes(layers, routes) / bandwidth
            del layers, calls
            torch.cuda.empty_cache()
        for tokens in options.tokens:
            bf16 = float("nan") if options.no_bf16 else time_bf16(SHAPES[name], tokens, ids[tokens])
            for rank in options.ranks:
                ours, bare, limit = timed[rank, tokens], timed[0, tokens], limits[rank, tokens]
                row = {"shape": name, "tokens": tokens, "rank": rank, "ours_us": ours, "ours_rank0_us": bare}
                rows.append(row | {"bf16_us": None if options.no_bf16 else bf16, "limit_us": limit})
                print(
                    f"{name:17s} tokens {tokens:4d} rank {rank:4d}  ours {ours:7.1f}  rank 0 {bare:7.1f}  "
                    f"limit {limit:6.1f} ({100 * limit / ours:3.0f} %)  bf16 {bf16:7.1f}",
                    flush=True,
                )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"device": torch.cuda.get_device_name(), "read_tb_s": bandwidth / 1e6, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
