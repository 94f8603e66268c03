"""One work item: a stack of equal-shaped matrices in, their stored tensors and errors out.

Members of rank 0 need a single solve. The others are bucketed by rank (powers of two), so that a stack in which one
expert has rank 1024 and its neighbours 8 does not pay 1024 for all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from milo.errors import PlanError, WeightError
from milo.format.matrix import Encoding
from milo.solve.alternate import GridSearch, alternate
from milo.solve.clip_search import mse_grid
from milo.solve.factors import round_factors
from milo.solve.grid import Grid, decode, grid_tensors, minmax_grid, nearest, pack
from milo.solve.half_quadratic import hqq_grid
from milo.solve.lowrank import whole

GRIDS: dict[str, GridSearch] = {"rtn": minmax_grid, "hqq": hqq_grid, "mse": mse_grid}
_FULL = 64  # the bucket of full rank, above the bit length of any rank
# Bit length below which ranks are not told apart. A GPU reads a residual in the time that products with 128 columns
# take, and up to there orthonormalises in one launch (`calls.WIDEST`), so that few buckets are best.
_LEAST = {"cuda": 7}
# Grids whose compensators start from the weights; the others start as the paper does.
FACTORS_FIRST = ("mse",)
# Grids that know how to weight the in-features.
WEIGHTED: dict[str, Callable[..., Grid]] = {"mse": mse_grid}


@dataclass
class Solved:
    """One compressed matrix.

    Attributes:
        tensors: named as in the format (`weight_packed`, ..., `lowrank_v_scale`), on the device of the input.
        error: relative Frobenius error `‖W − Ŵ‖ / ‖W‖` of what is stored (0 for a zero matrix).
        error_unrounded: the same before the factors were rounded.
        rounds: solves that ran.
        weighted_error: `error` with every in-feature's squared error times its importance.
    """

    tensors: dict[str, torch.Tensor]
    error: float
    error_unrounded: float
    rounds: int
    weighted_error: float


def solve_stack(
    weight: torch.Tensor,
    ranks: list[int],
    encoding: Encoding,
    grid: str = "hqq",
    rounds: int = 20,
    name: str = "weight",
    importance: torch.Tensor | None = None,
) -> list[Solved]:
    """Compress every matrix of a stack.

    Args:
        weight: `[E, N, K]`, any floating dtype, CPU or CUDA.
        ranks: rank of each matrix, 0 to `min(N, K)`.
        encoding: how the result is written.
        grid: `rtn`, `hqq` or `mse`.
        rounds: solves of the alternation at most (matrices of rank 0 take one).
        name: used in error messages.
        importance: float32 `[E, K]`, weights of the in-features' squared errors, 1 on average; all alike without. Only
            `mse` follows it.

    Returns:
        One `Solved` a matrix, in order.

    Raises:
        WeightError: NaN, Inf, or a magnitude beyond fp16 in the weights.
        PlanError: unknown grid, or ranks that do not fit the stack.
    """
    if grid not in GRIDS:
        raise PlanError(f"unknown grid {grid!r}; choose one of {', '.join(GRIDS)}")
    if len(ranks) != weight.shape[0] or min(ranks) < 0 or max(ranks) > min(weight.shape[1:]):
        raise PlanError(f"{name}: ranks {ranks} do not fit a stack of shape {tuple(weight.shape)}")
    weight = weight.float().contiguous()
    _check_values(weight, name)
    results: dict[int, Solved] = {}
    for members in buckets(ranks, min(weight.shape[1:]), weight.device.type):
        index = torch.tensor(members, device=weight.device)
        part = weight if len(members) == weight.shape[0] else weight[index]
        ours = None if importance is None else importance.to(weight.device)[index]
        solved = _solve_bucket(part, [ranks[m] for m in members], encoding, grid, rounds, ours)
        results.update(zip(members, solved, strict=True))
    return [results[m] for m in range(len(ranks))]


def _solve_bucket(
    weight: torch.Tensor,
    ranks: list[int],
    encoding: Encoding,
    grid: str,
    rounds: int,
    importance: torch.Tensor | None,
) -> list[Solved]:
    search, fit, ran = GRIDS[grid], None, [1] * len(ranks)
    if importance is not None and grid in WEIGHTED:
        search = partial(WEIGHTED[grid], importance=importance)
    if max(ranks) > 0 and min(ranks) < min(weight.shape[1:]):
        best = alternate(weight, ranks, search, encoding, rounds, factors_first=grid in FACTORS_FIRST)
        found, codes, fit, unrounded, ran = best.grid, best.codes, best.fit, best.error, best.rounds.tolist()
        del best
    else:
        found = search(weight, encoding)
        codes, unrounded = nearest(weight, found, encoding)
    error, target = unrounded, weight
    factors: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
    if max(ranks) > 0:
        target = weight - decode(codes, found, encoding)
        if fit is None:  # full rank: one round, and nothing is left before the factors are rounded
            fit, unrounded = whole(target), torch.zeros_like(unrounded)
        u, v = fit.factors()
        del fit
        # All members at once where launches count, one by one where memory does.
        step = len(ranks) if weight.is_cuda else 1
        for first in range(0, len(ranks), step):
            part = slice(first, first + step)
            width = max(ranks[part])
            tensors, product = round_factors(target[part], u[part, :, :width], v[part, :width], encoding.factor)
            torch.sub(weight[part], product, out=target[part])
            for i, rank in enumerate(ranks[part]):
                factors[first + i] = {name: tensor[i, :rank] for name, tensor in tensors.items()}
        # The codes have the last word: nearest to what the rounded compensators leave. Leading directions of the
        # weights leave more than the grid was made for once they are rounded, so then it is searched anew.
        if grid in FACTORS_FIRST:
            found = search(target, encoding)
        codes, error = nearest(target, found, encoding)

    norm = torch.linalg.vector_norm(weight, dim=(1, 2)).double()
    relative = torch.where(norm > 0, 1 / norm, 0.0)
    weighted = error
    if importance is not None:
        left = (decode(codes, found, encoding) - target).square_()
        weighted = (left.sum(1, dtype=torch.float64) * importance).sum(1).sqrt()
    errors, errors_unrounded, errors_weighted = (torch.stack([error, unrounded, weighted]) * relative).tolist()
    stacked = _code_tensors(codes, encoding) | grid_tensors(found, encoding)
    return [
        Solved(
            {k: t[i] for k, t in stacked.items()} | factors[i],
            errors[i],
            errors_unrounded[i],
            ran[i],
            errors_weighted[i],
        )
        for i in range(len(ranks))
    ]


def _code_tensors(codes: torch.Tensor, encoding: Encoding) -> dict[str, torch.Tensor]:
    if encoding.planes == 1:
        return {"weight_packed": pack(codes, encoding.bits)}
    low = codes & (2**encoding.plane_bits - 1)
    return {
        "weight_packed": pack(low, encoding.plane_bits),
        "weight_packed_hi": pack(codes >> encoding.plane_bits, encoding.plane_bits),
    }


def buckets(ranks: Sequence[int], full: int, device_type: str) -> list[list[int]]:
    """Members that are solved together, lowest ranks first.

    Args:
        ranks: of every member.
        full: the smaller side of the matrices.
        device_type: `cpu` or `cuda`.

    Returns:
        Members of rank 0, members grouped by `rank.bit_length()` (short ones together on a GPU), those of full rank.
    """
    least = _LEAST.get(device_type, 0)
    grouped: dict[int, list[int]] = defaultdict(list)
    for member, rank in enumerate(ranks):
        key = max(rank.bit_length(), least) if 0 < rank < full else rank and _FULL
        grouped[key].append(member)
    return [grouped[key] for key in sorted(grouped)]


def _check_values(weight: torch.Tensor, name: str) -> None:
    top = torch.linalg.vector_norm(weight, ord=torch.inf, dim=(1, 2)).tolist()  # a NaN anywhere survives the maximum
    for member, value in enumerate(top):
        if not math.isfinite(value):
            where = f" (member {member} of {len(top)})" if len(top) > 1 else ""
            raise WeightError(f"{name}{where} holds NaN or Inf; the source checkpoint is damaged")
    if max(top) > 65504:
        raise WeightError(f"{name} holds {max(top):.3g}, beyond what fp16 scales can express (65504)")
