"""Time every configuration of the decode kernels, and prefill, over numbers of tokens: where one should take over.

    python benchmarks/sweep.py [--tokens 16 64] [--configs 2,8,3,2,2048 ...] [--out sweep.json]

As `benchmarks/moe.py` times: CUDA-graph replay over a ring of layers that misses L2, random routing, microseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from moe import SHAPES, Layer, graph_time, random_layers, route

from milo.kernels import decode, prefill
from milo.kernels.cutting import CONFIGS, Config, Wide, choose


def parse(text: str) -> Config:
    """token tiles, warps, stages, blocks an SM, pairs."""
    numbers = [int(n) for n in text.split(",")]
    return (Wide if numbers[0] > 1 else Config)(*numbers)


def compile_all(configs: list[Config]) -> None:
    """All at once; the compiler runs without Python's lock."""
    device = torch.cuda.current_device()
    decode._counters(device)

    def build(config: Config) -> None:
        with torch.cuda.device(device):
            for fitted in decode._fitting((config,), 3, 1, device):
                decode._kernels(fitted, 3, 1, False, device)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(build, configs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time configurations of the kernels.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--configs", type=parse, nargs="+", default=list(CONFIGS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    compile_all([*options.configs, *CONFIGS])
    print(torch.cuda.get_device_name(), "microseconds; * is what the host would choose among the decode kernels")
    rows = []
    for name in options.shapes:
        hidden, _, experts, topk = SHAPES[name]
        ids = {t: [route(t, experts, topk) for _ in range(8)] for t in options.tokens}
        for rank in options.ranks:
            layers = random_layers(SHAPES[name], rank)
            for tokens in options.tokens:
                x = torch.randn(tokens, hidden, device="cuda", dtype=torch.float16)
                weights = torch.rand(tokens, topk, device="cuda")

                def timed(
                    run: Callable[[Layer, torch.Tensor], torch.Tensor],
                    layers: list[Layer] = layers,
                    routes: list[torch.Tensor] = ids[tokens],
                ) -> float:
                    pairs = zip(layers, routes[: len(layers)], strict=True)
                    calls = [lambda layer=layer, i=i: run(layer, i) for layer, i in pairs]
                    return graph_time(calls, options.repeats)

                mean, found = tokens * topk / experts, {}
                for config in options.configs:
                    if not mean / 2.5 <= config.tokens <= max(16, 6 * mean):
                        continue  # hopeless

                    def run(
                        layer: Layer,
                        i: torch.Tensor,
                        config: Config = config,
                        x: torch.Tensor = x,
                        weights: torch.Tensor = weights,
                    ) -> torch.Tensor:
                        return decode.moe_ffn(x, *layer, i, weights, "silu", None, config)

                    label = ",".join(map(str, (config.token_tiles, config.warps, config.stages, config.blocks)))
                    if config == choose(tokens, tokens * topk, experts):
                        label += "*"
                    found[label] = round(timed(run), 1)
                if mean >= 16 and prefill.supports(x.device, x.dtype)[0]:
                    found["prefill"] = round(
                        timed(lambda layer, i, x=x, w=weights: prefill.moe_ffn(x, *layer, i, w, "silu", None)), 1
                    )
                rows.append({"shape": name, "rank": rank, "tokens": tokens, "us": found})
                print(f"{name:17s} rank {rank:3d} tokens {tokens:4d}  {found}", flush=True)
            del layers, timed
            torch.cuda.empty_cache()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
