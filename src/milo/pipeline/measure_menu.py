"""The menu's errors, measured on the weights in one streamed pass: every matrix is read once and solved in every way.

Ranks are tried where they have a chance only. A compensator that carries the share `p` of a matrix's energy leaves
at best `1 − p` for the codes, worth `−½ log₂(1 − p)` bits a weight; where that does not exceed the bits its factors
take by a margin, it cannot pay. One round from the weights' own leading directions measures the rest; the plan's
further rounds end a few per cent lower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from milo.checkpoint.inventory import Group
from milo.checkpoint.roles import Role
from milo.format.matrix import Encoding
from milo.pipeline.job import on_device
from milo.pipeline.planning import Source
from milo.pipeline.pools import as_finished, solving_threads
from milo.pipeline.work import one_thread, pieces, read_members, worker_count
from milo.plan.budget import GRID
from milo.plan.menu import HEAD_BITS, MENU, RANKS, Measured
from milo.plan.plan import Row
from milo.solve.lowrank import fit_lowrank
from milo.solve.stack import solve_stack

MENU_ROUNDS = 1
# Bits a weight that the bound above must promise.
_MARGIN = 0.05
# Where codes are finer, what a rank buys is dearer than a bit.
_RANKED_BITS = 4


def measure_menu(
    source: Source,
    importance: Mapping[str, torch.Tensor] | None = None,
    menu: Sequence[Encoding] = MENU,
    ranks: Sequence[int] = RANKS,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> dict[str, Measured]:
    """Squared errors of every option of every group.

    Args:
        source: an opened source.
        importance: of the in-features, float32 `[E, K]` by group name (`milo.plan.sensitivity`).
        menu: encodings to try.
        ranks: ranks to try.
        device: where matrices are solved.
        progress: called with (weights done, all, name).

    Raises:
        WeightError: NaN or Inf in a matrix.
    """
    groups = {group.name: group for group in source.inventory.candidates}
    offered = {name: _menu(group, menu) for name, group in groups.items()}
    rows = [Row(g.name, g.role, g.kind, g.shape, (0,) * g.count, menu[0], GRID, g.transposed) for g in groups.values()]

    @torch.no_grad()
    def solve(item: tuple[Row, range]) -> tuple[Row, range, list[Member]]:
        row, members = item
        weight = read_members(source.checkpoint, groups[row.name], members).on(device).float()
        known = (importance or {}).get(row.name)
        with on_device(device):
            found = measure_stack(
                weight,
                offered[row.name],
                ranks,
                row.name,
                None if known is None else known[members.start : members.stop],
            )
        return row, members, found

    total, done = sum(row.parameters for row in rows), 0
    members_of: dict[str, dict[int, Member]] = {name: {} for name in groups}
    workers = worker_count(device)
    pool = solving_threads(workers)
    try:
        with one_thread():
            items = ((row, members) for row in rows for members in pieces(row, device))
            for row, members, found in as_finished(pool, solve, items, workers + 1):
                members_of[row.name] |= dict(zip(members, found, strict=True))
                done += len(members) * row.shape[0] * row.shape[1]
                progress(done, total, row.name)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return {name: summed([found[m] for m in sorted(found)], offered[name]) for name, found in members_of.items()}


def _menu(group: Group, menu: Sequence[Encoding]) -> list[Encoding]:
    """What a group is offered: a head, whose errors nothing behind it mends, no codes below `HEAD_BITS`."""
    return [encoding for encoding in menu if group.role is not Role.HEAD or encoding.bits >= HEAD_BITS]


@dataclass
class Member:
    """One matrix: its squared norm, and its squared errors by encoding and rank."""

    norm: float
    errors: dict[Encoding, dict[int, float]]


def summed(members: Sequence[Member], menu: Sequence[Encoding]) -> Measured:
    """A group's errors from its members', in their order."""
    return Measured(sum(m.norm for m in members), {e: [m.errors[e] for m in members] for e in menu})


def measure_stack(
    weight: torch.Tensor, menu: Sequence[Encoding], ranks: Sequence[int], name: str, importance: torch.Tensor | None
) -> list[Member]:
    """Errors of every option of some matrices.

    Args:
        weight: float32 `[E, N, K]`.
        menu: encodings to try.
        ranks: ranks to try.
        name: of the group, for errors.
        importance: of the in-features, float32 `[E, K]`, or None.

    Raises:
        WeightError: NaN or Inf in a matrix.
    """
    norms = torch.linalg.vector_norm(weight, dim=(1, 2)).double().square().tolist()
    found = [Member(norm, {}) for norm in norms]
    for encoding in menu:
        plain = solve_stack(weight, [0] * len(norms), encoding, GRID, name=name, importance=importance)
        for member, solved in zip(found, plain, strict=True):
            member.errors[encoding] = {0: solved.weighted_error**2 * member.norm}
    coarse = [encoding for encoding in menu if encoding.bits <= _RANKED_BITS]
    for rank, members in _promising(weight, norms, ranks, coarse[0]).items() if coarse else ():
        part = weight[torch.tensor(members, device=weight.device)]
        known = None if importance is None else importance[members]
        for encoding in coarse:
            ranked = solve_stack(part, [rank] * len(members), encoding, GRID, MENU_ROUNDS, name, known)
            for m, solved in zip(members, ranked, strict=True):
                found[m].errors[encoding][rank] = solved.weighted_error**2 * norms[m]
    return found


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
