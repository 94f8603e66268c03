"""Time a whole MoE FFN with its compensators, beside Humming, bf16 grouped GEMM and the limit of the memory.

    python benchmarks/moe.py --out benchmarks/results/moe_h100.json
    python benchmarks/moe.py --shapes mixtral-8x7b --tokens 1 8 --peers humming_w3 --routing random zipf
    python benchmarks/moe.py --official --out benchmarks/results/moe_official_h100.json

Every figure is the median of CUDA-graph replays over a ring of distinct layers that together exceed L2 many times;
all systems see the same routing. `limit` is the bytes of the touched experts (codes, metadata, compensators) over the
read bandwidth measured in the same run. `ours` is the whole FFN from the router's choices to the sum. Peers
(`peers.py`) are timed twice: `NAME_us` is their two products alone, on tokens that are already sorted, and
`NAME_ffn_us` adds the activation and the weighted sum. A peer that fails leaves null and a traceback.

`--official` times Mixtral with the ranks that the official rule gives all 32 layers' experts (`kurtosis.py`), beside
rank 32 and rank 0; every expert of every layer is chosen equally often.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from campaign import Row, run
from humming_peer import FORMATS, Need
from peers import PEERS, Case, open_peer, time_peer
from record import figures
from synthetic import ROUTINGS, SHAPES, ZIPF, Layer, Shape, official_layers, random_layers, route, touched_bytes
from timing import graph_time

from milo import ops

OFFICIAL_TOKENS = 64  # the most with the official ranks: what they cost is decided where weights are the limit


def time_ours(layers: Sequence[Layer], case: Case, x: torch.Tensor) -> float:
    """Microseconds of our FFN; the case has a routing for each layer."""
    return graph_time(
        [
            lambda layer=layer, ids=ids: ops.moe_ffn(x, *layer, ids, case.weights)
            for layer, ids in zip(layers, case.ids, strict=True)
        ]
    )


def cases_of(shape: Shape, options: argparse.Namespace) -> list[Case]:
    return [
        Case(
            routing,
            tokens,
            [route(routing, tokens, shape, options.device) for _ in range(shape.ring)],
            torch.rand(tokens, shape.topk, device=options.device),
        )
        for routing in options.routing
        for tokens in options.tokens
    ]


def measure(name: str, bandwidth: float, options: argparse.Namespace) -> list[Row]:
    """All rows of one shape."""
    shape = SHAPES[name]
    cases = cases_of(shape, options)
    inputs = [torch.randn(case.tokens, shape.hidden, device=options.device, dtype=options.dtype) for case in cases]
    timed: dict[int, list[float]] = {}
    limits: dict[int, list[float]] = {}
    for rank in dict.fromkeys((*options.ranks, 0)):
        layers = random_layers(shape, rank, options.device)
        timed[rank] = [time_ours(layers, case, x) for case, x in zip(cases, inputs, strict=True)]
        limits[rank] = [touched_bytes(layers, case.ids) / bandwidth for case in cases]
        del layers
        torch.cuda.empty_cache()
    others: list[dict[str, float | None]] = [{f"{peer}_us": None for peer in PEERS[:3]} for _ in cases]
    for peer in options.peers:
        found = time_peer(peer, lambda peer=peer: open_peer(peer, shape, options.dtype, options.device), cases)
        others = [row | new for row, new in zip(others, found, strict=True)]
        torch.cuda.empty_cache()
    return [
        {
            "shape": name,
            "tokens": case.tokens,
            "routing": case.routing,
            "rank": rank,
            "ours_us": timed[rank][i],
            "ours_rank0_us": timed[0][i],
            **others[i],
            "limit_us": limits[rank][i],
        }
        for i, case in enumerate(cases)
        for rank in options.ranks
    ]


def measure_official(name: str, bandwidth: float, options: argparse.Namespace) -> list[Row]:
    """The official ranks: every layer once a visit, and in each visit every choice is the next expert."""
    shape = SHAPES[name]
    official = official_layers(shape, options.layers, options.device)
    uniform = {rank: random_layers(shape, rank, options.device) for rank in (32, 0)}
    rows = []
    for tokens in (tokens for tokens in options.tokens if tokens <= OFFICIAL_TOKENS):
        x = torch.randn(tokens, shape.hidden, device=options.device, dtype=options.dtype)
        first = [route("random", tokens, shape, options.device) for _ in official]
        ids = [(each + visit) % shape.experts for visit in range(shape.experts) for each in first]
        weights = torch.rand(tokens, shape.topk, device=options.device)
        us = {}
        for label, layers in (("milo-s2", official), *uniform.items()):
            calls = [layers[i % len(layers)] for i in range(len(ids))]
            us[label] = time_ours(calls, Case("random", tokens, ids, weights), x)
        calls = official * shape.experts
        rows.append(
            {
                "shape": name,
                "tokens": tokens,
                "routing": "random",
                "rank": "milo-s2",
                "ours_us": us["milo-s2"],
                "ours_rank32_us": us[32],
                "ours_rank0_us": us[0],
                "limit_us": touched_bytes(calls, ids) / bandwidth,
            }
        )
    return rows


def line(row: Row) -> str:
    """A row for people."""
    share = 100 * row["limit_us"] / row["ours_us"]
    what = f"{row['shape']:17s} tokens {row['tokens']:4d} {row['routing']:6s} rank {row['rank']}"
    return f"{what}  {figures(row)}  ({share:.0f} %)"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32])
    full = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", default=full, choices=list(SHAPES))
    parser.add_argument("--routing", nargs="+", default=["random"], choices=ROUTINGS)
    parser.add_argument("--peers", nargs="*", default=["bf16", "humming_w3", "humming_w4"], choices=PEERS)
    parser.add_argument("--official", action="store_true", help="the official rule's ranks, and no peers")
    parser.add_argument("--layers", type=int, default=32, help="of the model with the official ranks")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16", help="ours and Humming's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.device, options.dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.official:
        options.peers = []
        options.shapes = [name for name in options.shapes if name in ("mixtral-8x7b", "tiny")]
    return options


def needs(options: argparse.Namespace) -> list[Need]:
    """The products that Humming is to multiply."""
    return [
        Need(label, n, k, shape.experts, tokens * shape.topk)
        for label in options.peers
        if label in FORMATS
        for shape in (SHAPES[name] for name in options.shapes)
        for n, k in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
        for tokens in options.tokens
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    more = {"zipf_exponent": ZIPF} if "zipf" in options.routing else {}
    run(options, more, needs(options), measure_official if options.official else measure, line)


if __name__ == "__main__":
    main()
