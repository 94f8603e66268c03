"""Time what a budget takes on Mixtral-8x7B's shapes, beside `milo-s2`: menu, allocation, compression.

    python benchmarks/budget_time.py [--layers 4] [--out benchmarks/results/budget_time_h100.json]

Weights are those of `solver.py`, made on the device a layer at a time. The menu's errors are measured as `milo plan
--budget` does it, the choices for all 32 layers are allocated from them (the timed layers' errors repeated), and the
timed layers are compressed as allocated. Sensitivities and the weights of in-features are drawn: reading them off a
model is not the solver's time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from published import config_of, heads_of
from record import header, write
from solver import Group, make, mixtral, pieces, solve_layer, timed

from milo.pipeline.measure_menu import measure_stack, summed
from milo.pipeline.work import piece_size
from milo.plan.budget import GRID, plan_for_bytes
from milo.plan.menu import MENU, RANKS, Measured
from milo.plan.plan import Row
from milo.plan.sensitivity import structural
from milo.solve.stack import solve_stack

RATE = 3.55  # bits a weight: `milo-s1` of Mixtral-8x7B


def measure(group: Group, importance: torch.Tensor, piece: int) -> Measured:
    """The menu's errors of one group."""
    members = []
    for part in pieces(group, piece):
        members += measure_stack(group.weight[part].float(), MENU, RANKS, group.name, importance[part])
    return summed(members, MENU)


def compress(group: Group, row: Row, importance: torch.Tensor, rounds: int, piece: int) -> None:
    """The group as the plan's row says."""
    for part in pieces(group, piece):
        solve_stack(group.weight[part], row.ranks[part], row.encoding, GRID, rounds, group.name, importance[part])


def run(args: argparse.Namespace) -> dict[str, Any]:
    device, piece = torch.device(args.device), piece_size(args.device)
    model = mixtral(args.tiny)[: args.layers]
    _, inventory = heads_of({**config_of("tiny" if args.tiny else "mixtral-8x7b"), "num_local_experts": 8})
    seconds = {"milo-s2": 0.0, "menu": 0.0, "allocation": 0.0, "compression": 0.0}
    measured: list[dict[str, Measured]] = []

    def prepare(i: int) -> dict[str, torch.Tensor]:
        for j, group in enumerate(model[i]):
            make(group, device, 1000 * i + j)
        draw = torch.Generator(device).manual_seed(i)
        sizes = {group.name: (len(group.kurtosis), group.shape[1]) for group in model[i]}
        return {n: torch.rand(s, generator=draw, device=device).add_(0.5) for n, s in sizes.items()}

    def drop(layer: list[Group]) -> None:
        for group in layer:
            group.weight = torch.empty(0)

    def measure_layer(layer: list[Group], importance: Mapping[str, torch.Tensor]) -> None:
        measured.append({group.name: measure(group, importance[group.name], piece) for group in layer})

    def compress_layer(layer: list[Group], rows: Mapping[str, Row], importance: Mapping[str, torch.Tensor]) -> None:
        for group in layer:
            compress(group, rows[group.name], importance[group.name], plan.rounds, piece)

    for i, layer in enumerate(model):
        importance = prepare(i)
        if i == 0:  # compiles what is new; not counted
            solve_layer(layer, 3, piece, ranked=True)
            for group in layer:
                measure(group, importance[group.name], piece)
        seconds["milo-s2"] += solve_layer(layer, args.rounds, piece, ranked=True)[0]
        seconds["menu"] += timed(device, partial(measure_layer, layer, importance))
        drop(layer)

    def found(name: str) -> Measured:
        number = int(name.split(".layers.")[1].split(".")[0])
        return measured[number % len(measured)][name.rpartition(".")[2]]

    candidates = [group for group in inventory.candidates if ".layers." in group.name]
    weights = sum(group.parameters for group in candidates)
    begin = time.perf_counter()
    plan = plan_for_bytes(
        candidates,
        {g.name: found(g.name) for g in candidates},
        structural(candidates),
        int(RATE * weights / 8),
        "timing",
    ).plan
    seconds["allocation"] = time.perf_counter() - begin

    for i, layer in enumerate(model):
        importance = prepare(i)
        rows = {row.name.rpartition(".")[2]: row for row in plan.rows if f".layers.{i}." in row.name}
        seconds["compression"] += timed(device, partial(compress_layer, layer, rows, importance))
        drop(layer)

    share = len(model) / args.of
    budget = seconds["menu"] + seconds["compression"] + seconds["allocation"] * share
    return {
        **header(device, {"layers": len(model)}, "torch"),
        "seconds": seconds,
        "budget_seconds": budget,
        "ratio": budget / seconds["milo-s2"],
        "bits_per_weight": plan.bits_per_weight,
        "rank_sum": sum(sum(row.ranks) for row in plan.rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=4, help="layers that are solved, of 32")
    parser.add_argument("--rounds", type=int, default=20, help="of milo-s2")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.of = len(mixtral(args.tiny))
    torch.set_grad_enabled(False)
    found = run(args)
    print(json.dumps(found, indent=1))
    if args.out:
        write(args.out, found)


if __name__ == "__main__":
    main()
