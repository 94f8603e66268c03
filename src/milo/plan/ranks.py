"""Rank policies: how much compensator each matrix gets (section 2 of the paper).

A policy is a sum of terms `name:r`, e.g. `dense:512+kurtosis:16`; the ranks of the terms add up. `r` is a number or a
fraction of the model's hidden size (`h/8`).

| term | who gets rank |
|---|---|
| `uniform:r` | every matrix r |
| `dense:r` | attention, shared experts and dense FFNs r, experts 0 |
| `sparse:r` | experts r, the others 0 |
| `frequency:r` | experts r on average within a layer, in proportion to how often each is routed to |
| `kurtosis:r` | experts r on average over the model, in proportion to κ − κ_min of each matrix |
| `kurtosis2:r` | experts by the official code's rule: 2^(round κ + k), k = log2(r) − 2 |

The paper gives no formula for Kurtosis-r; `kurtosis` is ours and keeps the promised mean, `kurtosis2` is what the
official code does (its mean on Mixtral-8x7B is 22.0 for r = 16). Frequency needs routing counts (`milo profile`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from milo.checkpoint.inventory import Group
from milo.checkpoint.roles import Role
from milo.errors import PlanError

Kurtosis = Callable[[Group], Sequence[float]]
Counts = Mapping[str, Sequence[float]]


@dataclass
class Evidence:
    """What data-dependent policies look at.

    Attributes:
        kurtosis: excess kurtosis of each member of a group; reads the weights.
        counts: tokens routed to each expert, by `Group.experts_path`; None if nobody measured them.
    """

    kurtosis: Kurtosis
    counts: Counts | None = None


def parse_policy(policy: str, hidden: int) -> list[tuple[str, int]]:
    """`dense:h/8+kurtosis:16` to `[("dense", 512), ("kurtosis", 16)]`.

    Raises:
        PlanError: unknown term, or a rank that is not a non-negative integer.
    """
    if policy == "none":
        return []
    terms = []
    for term in policy.split("+"):
        name, _, amount = term.strip().partition(":")
        if name not in POLICIES:
            raise PlanError(f"unknown rank policy {name!r} in {policy!r}; choose from {', '.join(POLICIES)} or none")
        terms.append((name, _amount(amount, hidden, policy)))
    return terms


def assign_ranks(
    groups: Sequence[Group], policy: str, hidden: int, evidence: Evidence
) -> tuple[dict[str, list[int]], int]:
    """Rank of every member of every group.

    Args:
        groups: what can be compressed.
        policy: a sum of terms.
        hidden: the model's hidden size, for `h/8`.
        evidence: weights and counts for the terms that need them.

    Returns:
        Ranks by group name, and how many matrices asked for more than `min(N, K)` and were clipped to it.

    Raises:
        PlanError: bad policy, missing or unfitting routing counts.
    """
    total = {group.name: [0] * group.count for group in groups}
    for name, rank in parse_policy(policy, hidden):
        for group_name, ranks in POLICIES[name](groups, rank, evidence).items():
            total[group_name] = [a + b for a, b in zip(total[group_name], ranks, strict=True)]
    clipped = 0
    for group in groups:
        limit = min(group.shape)
        clipped += sum(rank > limit for rank in total[group.name])
        total[group.name] = [min(rank, limit) for rank in total[group.name]]
    return total, clipped


def _amount(text: str, hidden: int, policy: str) -> int:
    try:
        if text.startswith("h"):
            if not hidden:
                raise PlanError(f"{policy!r} needs the model's hidden size, which its config does not name")
            value = Fraction(hidden) * Fraction("1" + text[1:])
        else:
            value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise PlanError(f"{text!r} in {policy!r} is no rank; write a number or h/8") from None
    if value < 0:
        raise PlanError(f"{text!r} in {policy!r} is negative")
    return round(value)


def _uniform(groups: Sequence[Group], rank: int, evidence: Evidence) -> dict[str, list[int]]:
    return {g.name: [rank] * g.count for g in groups}


def _dense(groups: Sequence[Group], rank: int, evidence: Evidence) -> dict[str, list[int]]:
    return {g.name: [rank] * g.count for g in groups if g.role.dense}


def _sparse(groups: Sequence[Group], rank: int, evidence: Evidence) -> dict[str, list[int]]:
    return {g.name: [rank] * g.count for g in groups if g.role is Role.EXPERT}


def _frequency(groups: Sequence[Group], rank: int, evidence: Evidence) -> dict[str, list[int]]:
    if evidence.counts is None:
        raise PlanError(
            "the frequency policy needs routing counts; measure them with `milo profile MODEL --text FILE -o "
            "counts.json` and pass --counts counts.json"
        )
    ranks = {}
    for group in (g for g in groups if g.role is Role.EXPERT):
        counts = evidence.counts.get(group.experts_path)
        if counts is None or len(counts) != group.count or not sum(counts) > 0:
            raise PlanError(
                f"the routing counts hold no {group.count} counts for {group.experts_path}; they were measured on "
                "another model: run `milo profile` on this one"
            )
        share = np.asarray(counts, dtype=np.float64) / sum(counts)
        ranks[group.name] = [round(x) for x in (share * rank * group.count).tolist()]
    return ranks


def _kurtosis(groups: Sequence[Group], rank: int, evidence: Evidence) -> dict[str, list[int]]:
    experts = [g for g in groups if g.role is Role.EXPERT]
    if not experts or rank == 0:
        return {}
    kappa = np.concatenate([np.asarray(evidence.kurtosis(g), dtype=np.float64) for g in experts])
    limits = np.concatenate([np.full(g.count, min(g.shape)) for g in experts])
    ranks = proportional(kappa - kappa.min(), rank * len(kappa), limits)
    bounds = np.cumsum([0] + [g.count for g in experts])
    return {g.name: ranks[a:b].tolist() for g, a, b in zip(experts, bounds, bounds[1:], strict=False)}


def _kurtosis2(groups: Sequence[Group], rank: int, evidence: Evidence) -> dict[str, list[int]]:
    shift = rank.bit_length() - 3  # 16 → 2 and 32 → 3, the only two the official code knows
    if shift < 0 or rank != 1 << (shift + 2):
        raise PlanError(f"kurtosis2:{rank} is not defined; its r is a power of two from 4 on (the paper's are 16, 32)")

    def rule(kappa: float) -> int:
        nearest = round(kappa)  # half to even, as the official code rounds
        if nearest < 1:
            return 0
        return 1024 if nearest > 9 else 2 ** (nearest + shift)

    return {g.name: [rule(k) for k in evidence.kurtosis(g)] for g in groups if g.role is Role.EXPERT}


def proportional(weights: np.ndarray, total: int, limits: np.ndarray) -> np.ndarray:
    """Integers proportional to `weights`, none above its limit, summing to `total` (or to all limits if smaller).

    What a limit cuts off goes to the others; the last units go to the largest remainders, ties to the first.
    All-equal weights share evenly.
    """
    total = min(total, int(limits.sum()))
    weights = np.maximum(weights, 0.0)
    if not weights.any():
        weights = np.ones_like(weights)
    share = np.zeros(len(weights))
    open_ = np.ones(len(weights), dtype=bool)
    while True:
        left = total - share[~open_].sum()
        mass = weights[open_].sum()
        if mass == 0:  # only zero-weight members are left for what the limits cut off: they share evenly
            if not open_.any():
                break
            weights = np.ones_like(weights)
            continue
        share[open_] = left * weights[open_] / mass
        full = open_ & (share > limits)
        if not full.any():
            break
        share[full] = limits[full]
        open_ &= ~full
    ranks = np.floor(share).astype(np.int64)
    remainder = np.where(ranks < limits, share - ranks, -1.0)
    order = np.argsort(-remainder, kind="stable")
    ranks[order[: total - int(ranks.sum())]] += 1
    return ranks


Policy = Callable[[Sequence[Group], int, Evidence], dict[str, list[int]]]
POLICIES: dict[str, Policy] = {
    "uniform": _uniform,
    "dense": _dense,
    "sparse": _sparse,
    "frequency": _frequency,
    "kurtosis": _kurtosis,
    "kurtosis2": _kurtosis2,
}
