"""Time every configuration of the decode kernels, and prefill, over numbers of tokens: where one should take over.

    python benchmarks/sweep.py [--tokens 16 64] [--configs 2,8,3,2,2048 ...] [--out sweep.json]

As `moe.py` times: graph replay over a ring of layers that misses L2, random routing, microseconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from record import header, write
from synthetic import SHAPES, Layer, random_layers, route
from timing import graph_time

from milo.kernels import decode, prefill
from milo.kernels.cutting import CONFIGS, Config, Wide, choose
from milo.kernels.launching import all_at_once

DTYPE = torch.bfloat16


def parse(text: str) -> Config:
    """A configuration: token tiles, warps, stages, blocks an SM, pairs."""
    numbers = [int(n) for n in text.split(",")]
    return (Wide if numbers[0] > 1 else Config)(*numbers)


def label(config: Config) -> str:
    return ",".join(map(str, (config.token_tiles, config.warps, config.stages, config.blocks)))


def compile_all(configs: list[Config]) -> None:
    device = torch.cuda.current_device()
    decode._counters(device)

    def build(config: Config) -> None:
        with torch.cuda.device(device):
            for fitted in decode._fitting((config,), 3, 1, device):
                decode._kernels(fitted, 3, 1, True, device)

    all_at_once(build, configs)


def time_config(
    config: Config | None, layers: list[Layer], ids: list[torch.Tensor], x: torch.Tensor, weights: torch.Tensor
) -> float:
    """Microseconds of a whole FFN; prefill's where there is no configuration."""

    def run(layer: Layer, i: torch.Tensor) -> torch.Tensor:
        if config is None:
            return prefill.moe_ffn(x, *layer, i, weights, "silu", None)
        return decode.moe_ffn(x, *layer, i, weights, "silu", None, config)

    calls = [lambda layer=layer, i=i: run(layer, i) for layer, i in zip(layers, ids, strict=True)]
    return round(graph_time(calls, 8), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time configurations of the kernels.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:3], choices=list(SHAPES))
    parser.add_argument("--configs", type=parse, nargs="+", default=list(CONFIGS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    compile_all(options.configs)
    rows = []
    for name in options.shapes:
        shape = SHAPES[name]
        routes = {t: [route("random", t, shape, device) for _ in range(shape.ring)] for t in options.tokens}
        for rank in options.ranks:
            layers = random_layers(shape, rank, device)
            for tokens, ids in routes.items():
                x = torch.randn(tokens, shape.hidden, device=device, dtype=DTYPE)
                weights = torch.rand(tokens, shape.topk, device=device)
                mean = tokens * shape.topk / shape.experts
                # Not those that are hopeless: most experts in many passes, or most of a tile empty.
                tried = [c for c in options.configs if mean / 2.5 <= c.tokens <= max(16, 6 * mean)]
                found = {label(c): time_config(c, layers, ids, x, weights) for c in tried}
                if mean >= 16 and prefill.supports(device, DTYPE)[0]:
                    found["prefill"] = time_config(None, layers, ids, x, weights)
                chosen = label(choose(tokens, tokens * shape.topk, shape.experts))
                rows.append({"shape": name, "rank": rank, "tokens": tokens, "us": found, "chosen": chosen})
                print(f"{name:17s} rank {rank:3d} tokens {tokens:4d}  {found}  chosen: {chosen}", flush=True)
            del layers
            torch.cuda.empty_cache()
    if options.out:
        write(options.out, header(device, {"dtype": str(DTYPE)}) | {"rows": rows})


if __name__ == "__main__":
    main()
