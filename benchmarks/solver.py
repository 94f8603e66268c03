"""Time the solver on whole models of heavy-tailed weights made on the device, beside the official procedure.

    python benchmarks/solver.py [--out benchmarks/results/solver_h100.json] [--models mixtral deepseek]
    python benchmarks/solver.py --tiny --device cpu          # the same code in seconds, on small shapes

Every layer gets distinct weights, made before its clock starts, and is solved in pieces as the pipeline would. Only the
solve is timed: from source weights in bfloat16 on the device to packed tensors on the device, host clock between two
synchronisations. Weights are normal with a log-normal scale an element and a few louder columns, mixed to a wanted
kurtosis, because Gaussian weights would get rank 0 from the official rule:

* Mixtral-8x7B `milo-s2`: attention 1,024, experts by the official rule from the kurtosis *measured* on these weights.
  The wanted values repeat the counts of the official kurtosis file (768 matrices, sum of ranks 25,632).
* DeepSeek-MoE-16B `milo-s2`: attention, shared experts and the dense FFN 1,024, experts in proportion to frequencies
  that fall geometrically by 11.7 from the most to the least used one (mean 32).

`official` is the official code's procedure written plainly: a matrix at a time, HQQ's legacy loop in half precision
with a host sync a step, `torch.svd_lowrank(q=rank, niter=2)`, the last round kept. A round costs the same whatever its
number, so the fastest of a few rounds of each kind of matrix (shape and rank) in the two layers of the lowest ranks
is multiplied out; errors are compared after all rounds, on one expert a kind and a part of an attention matrix.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from milo.format.matrix import Encoding
from milo.kernels.solver import calls
from milo.pipeline.work import piece_size
from milo.plan.statistics import excess_kurtosis
from milo.solve import alternate, factors, half_quadratic, lowrank, stack
from milo.solve.stack import Solved, solve_stack

# Rounded kurtosis of the official file for Mixtral-8x7B: {value: matrices}; 12 stands for "above 9".
DOWN = {0: 8, 1: 133, 2: 64, 3: 35, 4: 4, 6: 1, 7: 1, 9: 2, 12: 8}
UP = {0: 463, 1: 49}
SPREAD = 11.7  # most over least used expert of a DeepSeek layer
LOUD = 1 / 512  # share of columns that carry the kurtosis above 1


@dataclass
class Group:
    """A stack `[E, N, K]` of one layer."""

    name: str
    shape: tuple[int, int]
    kurtosis: list[float]  # wanted, one a matrix
    ranks: list[int] | None  # None: by the official rule from the measured kurtosis
    weight: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def official_rank(kurtosis: float, shape: tuple[int, int]) -> int:
    """`kurtosis2:32`: 2^(κ + 3), 1024 above 9, as the official code has it."""
    nearest = round(kurtosis)
    rank = 0 if nearest < 1 else 1024 if nearest > 9 else 2 ** (nearest + 3)
    return min(rank, *shape)


def mixtral(tiny: bool) -> list[list[Group]]:
    hidden, kv, inter, layers, rank = (128, 32, 192, 2, 32) if tiny else (4096, 1024, 14336, 32, 1024)
    shuffle = random.Random(0).shuffle
    wanted = {}
    for name, counts in (("down", DOWN), ("up", UP)):
        wanted[name] = [max(float(k), 0.2) for k, count in counts.items() for _ in range(count)]
        shuffle(wanted[name])
    model = []
    for i in range(layers):
        down, up = wanted["down"][8 * i : 8 * i + 8], wanted["up"][16 * i : 16 * i + 16]
        model.append(
            [
                *(Group(f"{n}_proj", (hidden, hidden), [1.6], [rank]) for n in "qo"),
                *(Group(f"{n}_proj", (kv, hidden), [1.6], [min(rank, kv)]) for n in "kv"),
                Group("w1", (inter, hidden), up[:8], None),
                Group("w3", (inter, hidden), up[8:], None),
                Group("w2", (hidden, inter), down, None),
            ]
        )
    return model


def deepseek(tiny: bool) -> list[list[Group]]:
    hidden, inter, dense, experts, layers = (64, 48, 96, 8, 2) if tiny else (2048, 1408, 10944, 64, 28)
    rank, mean = (24, 4) if tiny else (1024, 32)
    model = []
    for i in range(layers):
        frequency = [SPREAD ** (-e / (experts - 1)) for e in range(experts)]
        random.Random(i).shuffle(frequency)
        ranks = [round(f / sum(frequency) * mean * experts) for f in frequency]
        size, kind = (dense, "mlp") if i == 0 else (2 * inter, "shared")
        layer = [Group(f"{n}_proj", (hidden, hidden), [0.2], [rank]) for n in "qkvo"]
        layer += [Group(f"{kind}.{n}", (size, hidden), [0.3], [rank]) for n in ("gate", "up")]
        layer.append(Group(f"{kind}.down", (hidden, size), [0.3], [rank]))
        if i > 0:
            layer += [Group(n, (inter, hidden), [0.2] * experts, ranks) for n in ("gate", "up")]
            layer.append(Group("down", (hidden, inter), [0.2] * experts, ranks))
        model.append(layer)
    return model


MODELS: dict[str, Callable[[bool], list[list[Group]]]] = {"mixtral": mixtral, "deepseek": deepseek}


def loudness(kurtosis: float) -> float:
    """Scale of the loud columns that gives `kurtosis`: 3(E[s⁴]/E[s²]² − 1), by bisection."""
    low, high = 1.0, 100.0
    for _ in range(60):
        s = (low + high) / 2
        got = 3 * ((1 + LOUD * (s**4 - 1)) / (1 + LOUD * (s**2 - 1)) ** 2 - 1)
        low, high = (s, high) if got < kurtosis and s < 1 / LOUD**0.5 else (low, s)
    return low


def make(group: Group, device: torch.device, seed: int) -> None:
    """Weights of one group, and its ranks if its kurtosis decides them."""
    n, k = group.shape
    generator = torch.Generator(device).manual_seed(seed)
    group.weight = torch.empty(len(group.kurtosis), n, k, dtype=torch.bfloat16, device=device)
    for member, wanted in zip(group.weight, group.kurtosis, strict=True):
        element = min(wanted, 1.0)  # the rest comes from columns: (1 + κ/3) multiplies
        spread = math.sqrt(math.log(1 + element / 3) / 4)
        weight = torch.randn(n, k, generator=generator, device=device)
        weight *= torch.randn(n, k, generator=generator, device=device).mul_(spread).exp_()
        loud = loudness(3 * ((1 + wanted / 3) / (1 + element / 3) - 1))
        columns = torch.randperm(k, generator=generator, device=device)[: max(1, round(LOUD * k))]
        weight[:, columns] *= loud
        member.copy_(weight.mul_(0.02))
    if group.ranks is None:
        group.ranks = [official_rank(excess_kurtosis(m), group.shape) for m in group.weight]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pieces(group: Group, piece: int) -> list[slice]:
    """Members that are solved together, as the pipeline cuts them."""
    size = max(1, piece // (group.shape[0] * group.shape[1]))
    return [slice(first, first + size) for first in range(0, len(group.kurtosis), size)]


def solve_group(group: Group, ranks: list[int], rounds: int, piece: int) -> Iterator[Solved]:
    for members in pieces(group, piece):
        yield from solve_stack(group.weight[members], ranks[members], Encoding(), rounds=rounds)


def solve_layer(layer: list[Group], rounds: int, piece: int, ranked: bool) -> tuple[float, float]:
    """Seconds, and the mean relative error of what would be stored."""
    device = layer[0].weight.device
    synchronise(device)
    begin, errors = time.perf_counter(), []
    for group in layer:
        assert group.ranks is not None
        ranks = group.ranks if ranked else [0] * len(group.ranks)
        errors += [solved.error for solved in solve_group(group, ranks, rounds, piece)]
    synchronise(device)
    return time.perf_counter() - begin, sum(errors) / len(errors)


class Breakdown:
    """Time of the solver's parts, by events around each call (a host clock on a CPU)."""

    PARTS = (
        ("grid search", stack.GRIDS, "hqq"),
        ("quantise and residual", alternate, "quantise"),
        ("U·V and target", alternate, "next_target"),
        ("projections", lowrank, "_product"),
        ("orthogonalisation", lowrank, "_orthonormal"),
        ("factor rounding", stack, "round_factors"),
    )

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.mark()
            result = function(*args, **kwargs)
            self.spans.append((name, begin, self.mark()))
            return result

        return timed

    def run(self, layer: list[Group], rounds: int, piece: int) -> dict[str, float]:
        """Seconds of each part of one layer, and of everything else."""
        with ExitStack() as undo:
            for name, owner, attribute in self.PARTS:
                if isinstance(owner, dict):
                    undo.enter_context(patch.dict(owner, {attribute: self.wrap(name, owner[attribute])}))
                else:
                    undo.enter_context(patch.object(owner, attribute, self.wrap(name, getattr(owner, attribute))))
            seconds, _ = solve_layer(layer, rounds, piece, ranked=True)
        parts = dict.fromkeys((name for name, _, _ in self.PARTS), 0.0)
        for name, begin, end in self.spans:
            parts[name] += begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
        self.spans.clear()
        parts["rest"] = seconds - sum(parts.values())
        return parts


def official_hqq(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros by HQQ's legacy loop: groups of 64, half precision on a GPU, a host sync a step."""
    groups = weight.float().reshape(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    inverse = (7 / (high - low)).clamp(max=2e4)
    zero = -low * inverse
    kind = torch.float16 if weight.is_cuda else torch.float32
    w, s, z, beta, best = groups.to(kind), inverse.to(kind), zero.to(kind), 10.0, math.inf
    for _ in range(20):
        codes = (w * s + z).round().clamp(0, 7)
        rebuilt = (codes - z) / s
        error = w - rebuilt
        size = error.abs()
        shrunk = error.sign() * torch.relu(size - size.pow(0.7 - 1) / beta)
        z = (codes - (w - shrunk) * s).mean(1, keepdim=True)
        beta *= 1.01
        mean = float((w - rebuilt).abs().mean())
        if mean >= best:
            break
        best = mean
    z = z.float()
    return (groups * inverse + z).round().clamp(0, 7), (1 / inverse).half(), z.half()


def official(weight: torch.Tensor, rank: int, rounds: int) -> torch.Tensor:
    """The official procedure on one matrix: what it leaves, before its factors are rounded."""
    original = weight.float()
    target, left = original, original
    for _ in range(rounds):
        codes, scale, zero = official_hqq(target)
        rebuilt = ((codes.half() - zero) * scale).float().reshape(weight.shape)
        left = original - rebuilt
        if rank == 0:
            break
        u, s, v = torch.svd_lowrank(left, q=rank)
        root = s.sqrt()
        product = (u * root) @ (v * root).mT
        left = left - product
        target = original - product
    return left


def timed(device: torch.device, action: Callable[[], object]) -> float:
    synchronise(device)
    begin = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - begin


def compare(model: list[list[Group]], device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The official procedure and ours on the two layers of the lowest ranks: seconds, and errors of a few matrices."""

    def wanted_ranks(layer: list[Group]) -> int:
        return sum(official_rank(k, g.shape) for g in layer if g.ranks is None for k in g.kurtosis)

    layers = sorted(range(len(model)), key=lambda i: wanted_ranks(model[i]))[:2]
    ours, theirs, kinds = 0.0, 0.0, {}
    errors = []
    for i in layers:
        for j, group in enumerate(model[i]):
            make(group, device, 1000 * i + j)
        ours += solve_layer(model[i], args.rounds, args.piece, ranked=True)[0]
        for group in model[i]:
            for weight, rank in zip(group.weight, group.ranks or [], strict=True):
                kind = (group.shape, rank)
                if kind not in kinds:
                    if not kinds:
                        official(weight[:256, :256], min(rank, 16), 1)  # libraries load
                    spent = [timed(device, partial(official, weight, rank, 1))]
                    while len(spent) < args.official_rounds and sum(spent) < 1:  # the first also grows the allocator
                        spent.append(timed(device, partial(official, weight, rank, 1)))
                    kinds[kind] = min(spent)
                theirs += kinds[kind] * (args.rounds if rank else 1)
        if i == layers[0]:
            named = {group.name: group for group in model[i]}
            side = named["q_proj"].shape[0] // 4
            crop = named["q_proj"].weight[0, :side, :side].contiguous()
            cases = [("q_proj, upper left sixteenth", crop, side // 4)]
            for name in ("w1", "w2"):
                ranks = named[name].ranks or []
                member = max(range(len(ranks)), key=ranks.__getitem__)
                cases.append((name, named[name].weight[member], min(ranks[member], 64) or 16))
            for name, weight, rank in cases:
                norm = weight.float().norm()
                torch.manual_seed(0)
                errors.append(
                    {
                        "matrix": name,
                        "shape": list(weight.shape),
                        "rank": rank,
                        "rounds": args.rounds,
                        "official": (official(weight, rank, args.rounds).norm() / norm).item(),
                        "ours": solve_stack(weight[None], [rank], Encoding(), rounds=args.rounds)[0].error_unrounded,
                    }
                )
        for group in model[i]:
            group.weight = torch.empty(0)
    return {
        "layers": layers,
        "ours_seconds": ours,
        "official_seconds_extrapolated": theirs,
        "speedup": theirs / ours,
        "official_seconds_a_round": {f"{n}x{k} rank {r}": s for ((n, k), r), s in kinds.items()},
        "errors_before_factor_rounding": errors,
    }


def run_model(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    model = MODELS[name](args.tiny)
    chosen = model[: args.layers or len(model)]
    seconds = {"milo-s2": 0.0, "hqq": 0.0}
    errors: dict[str, list[float]] = {"milo-s2": [], "hqq": []}
    parameters, ranks, peak = 0, 0, 0
    breakdown: dict[str, float] = {}
    compiling = 0.0
    for i, layer in enumerate(chosen):
        for j, group in enumerate(layer):
            make(group, device, 1000 * i + j)
        if i < 2:  # compiles what is new, and lets the libraries choose their algorithms; not counted
            compiling += solve_layer(layer, 3, args.piece, ranked=True)[0]
            solve_layer(layer, 1, args.piece, ranked=False)
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        for recipe in ("hqq", "milo-s2"):
            spent, error = solve_layer(layer, args.rounds, args.piece, ranked=recipe == "milo-s2")
            seconds[recipe] += spent
            errors[recipe].append(error)
        if device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(device) - before)
        if i == min(1, len(chosen) - 1):
            breakdown = Breakdown(device).run(layer, args.rounds, args.piece)
        parameters += sum(g.weight.numel() for g in layer)
        ranks += sum(sum(g.ranks or []) for g in layer if len(g.kurtosis) > 1)
        for group in layer:
            group.weight = torch.empty(0)
    matrices = sum(len(g.kurtosis) for layer in chosen for g in layer if len(g.kurtosis) > 1)
    stacks = [len(g.kurtosis) * g.shape[0] * g.shape[1] * 2 for layer in chosen for g in layer]
    return {
        "layers": f"{len(chosen)} of {len(model)}",
        "parameters": parameters,
        "expert_matrices": matrices,
        "expert_rank_sum": ranks,
        "expert_rank_mean": ranks / max(matrices, 1),
        "seconds": seconds,
        "seconds_a_billion": {recipe: s / parameters * 1e9 for recipe, s in seconds.items()},
        "mean_relative_error": {recipe: sum(e) / len(e) for recipe, e in errors.items()},
        "warm_up_seconds": compiling,
        "breakdown_of_one_layer": breakdown,
        "peak_bytes_above_the_layer": peak,
        "largest_stack_bytes": max(stacks),
        "peak_allowed": 8 * max(stacks) + 10**9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=0, help="solve only the first so many layers of each model")
    parser.add_argument("--piece", type=int, help="weights solved together, at most; the pipeline's by default")
    parser.add_argument("--official-rounds", type=int, default=3, help="rounds timed a kind of matrix, 0 for none")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    args.piece = args.piece or piece_size(args.device)
    torch.set_grad_enabled(False)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "kernels": calls.usable(torch.zeros(1, device=device)),
        "rounds": args.rounds,
        "piece": args.piece,
        "tiny": args.tiny,
        "constants": {"cold_passes": lowrank.COLD_PASSES, "dither": alternate.DITHER, "steps": half_quadratic.STEPS},
        "factor_candidates": len(factors.CANDIDATES[3]),
    }
    for name in args.models:
        result[name] = run_model(name, device, args)
        print(json.dumps({name: result[name]}, indent=1), flush=True)
        if args.out:  # whatever comes after, this is kept
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.official_rounds and "mixtral" in args.models:
        result["official"] = compare(mixtral(args.tiny), device, args)
        print(json.dumps({"official": result["official"]}, indent=1), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
