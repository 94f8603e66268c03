"""The menu's errors, measured on the weights in one streamed pass: every matrix is read once and solved in every way.

Ranks are tried where they have a chance only. A compensator that carries the share `p` of a matrix's energy leaves
at best `1 − p` for the codes, worth `−½ log₂(1 − p)` bits a weight; where that does not exceed the bits its factors
take by a margin, it cannot pay. One round from the weights' own leading directions measures the rest; the plan's
further rounds end a few per cent lower.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from milo.format.matrix import Encoding
from milo.pipeline.planning import Source
from milo.pipeline.work import one_thread, pieces, read_members, worker_count
from milo.plan.budget import GRID
from milo.plan.menu import MENU, RANKS, Measured
from milo.plan.plan import Row
from milo.solve.lowrank import fit_lowrank
from milo.solve.stack import solve_stack

MENU_ROUNDS = 1
# Bits a weight that the bound above must promise.
_MARGIN = 0.05
# Where codes are finer, what a rank buys is dearer than a bit.
_RANKED_BITS = 4

Errors = dict[Encoding, list[dict[int, float]]]


def measure_menu(
    source: Source,
    menu: Sequence[Encoding] = MENU,
    ranks: Sequence[int] = RANKS,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> dict[str, Measured]:
    """Squared errors of every option of every group.

    Args:
        source: an opened source.
        menu: encodings to try.
        ranks: ranks to try.
        device: where matrices are solved.
        progress: called with (weights done, all, name).

    Raises:
        WeightError: NaN or Inf in a matrix.
    """
    groups = {group.name: group for group in source.inventory.groups}
    rows = [Row(g.name, g.role, g.kind, g.shape, (0,) * g.count, menu[0], GRID, g.transposed) for g in groups.values()]
    norms = dict.fromkeys(groups, 0.0)
    errors: dict[str, Errors] = {name: {encoding: [] for encoding in menu} for name in groups}

    def solve(row: Row, members: range) -> tuple[float, Errors]:
        weight = read_members(source.checkpoint, groups[row.name], members).on(device).float()
        return _errors(weight, menu, ranks, row.name)

    total, done = sum(row.parameters for row in rows), 0
    workers = worker_count(device)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    flying: deque[tuple[Row, range, Future[tuple[float, Errors]]]] = deque()

    def land() -> None:
        nonlocal done
        row, members, future = flying.popleft()
        norm, found = future.result()
        norms[row.name] += norm
        for encoding, by_member in found.items():
            errors[row.name][encoding] += by_member
        done += len(members) * row.shape[0] * row.shape[1]
        progress(done, total, row.name)

    with one_thread():
        try:
            for row in rows:
                for members in pieces(row, device):
                    flying.append((row, members, pool.submit(solve, row, members)))
                    if len(flying) > workers:
                        land()
            while flying:
                land()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return {name: Measured(norms[name], errors[name]) for name in groups}


def _errors(weight: torch.Tensor, menu: Sequence[Encoding], ranks: Sequence[int], name: str) -> tuple[float, Errors]:
    norms = torch.linalg.vector_norm(weight, dim=(1, 2)).double().square().tolist()
    found: Errors = {}
    for encoding in menu:
        plain = solve_stack(weight, [0] * len(norms), encoding, GRID, name=name)
        found[encoding] = [{0: solved.error**2 * norm} for solved, norm in zip(plain, norms, strict=True)]
    for rank, members in _promising(weight, norms, ranks, menu[0]).items():
        part = weight[torch.tensor(members, device=weight.device)]
        for encoding in (e for e in menu if e.bits <= _RANKED_BITS):
            ranked = solve_stack(part, [rank] * len(members), encoding, GRID, MENU_ROUNDS, name)
            for member, solved in zip(members, ranked, strict=True):
                found[encoding][member][rank] = solved.error**2 * norms[member]
    return sum(norms), found


def _promising(
    weight: torch.Tensor, norms: Sequence[float], ranks: Sequence[int], encoding: Encoding
) -> dict[int, list[int]]:
    """Members for which a rank may pay, by rank."""
    out_features, in_features = weight.shape[1:]
    allowed = [rank for rank in ranks if rank <= min(out_features, in_features) // 4]
    if not allowed:
        return {}
    width = max(allowed)
    right = fit_lowrank(weight, torch.full((len(weight),), width, device=weight.device), width).right
    carried = torch.linalg.eigvalsh((right @ right.mT).double()).flip(-1).cumsum(-1)  # by the leading directions
    chosen: dict[int, list[int]] = {}
    for rank in allowed:
        taken = sum(spec.nbytes for spec in encoding.factor_tensors(out_features, in_features, rank).values())
        bits = 8 * taken / (out_features * in_features)
        shares = [c / n if n else 0.0 for c, n in zip(carried[:, rank - 1].tolist(), norms, strict=True)]
        members = [m for m, share in enumerate(shares) if -0.5 * math.log2(max(1 - share, 1e-9)) - bits > _MARGIN]
        if members:
            chosen[rank] = members
    return chosen
