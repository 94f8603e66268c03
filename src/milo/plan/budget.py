"""A plan for a number of bytes: the allocator's choices as rows, with what explains them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from milo.checkpoint.inventory import Group
from milo.errors import PlanError
from milo.format.matrix import Encoding
from milo.plan.allocate import Allocation, allocate
from milo.plan.menu import Measured, Option, option, units
from milo.plan.plan import Plan, Row
from milo.plan.sensitivity import Sensitivities

GRID = "mse"
ROUNDS = 10
# The price of a byte decides the ranks and the ranks move the price; it settles at once.
_PRICINGS = 3
_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """How many bytes there are.

    Attributes:
        text: as the user wrote it.
        rate: bits a compressed weight, or None.
        folder: bytes of the whole output folder, or None.
    """

    text: str
    rate: float | None = None
    folder: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`3.4bpw` (the compressed matrices) or `20GiB`, `500MB` (the whole folder).

        Raises:
            PlanError: anything else.
        """
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
        unit = match[2].upper() if match else ""
        if match and unit == "BPW" and float(match[1]) > 0:
            return cls(text.strip(), rate=float(match[1]))
        if match and unit in _SIZES and float(match[1]) > 0:
            return cls(text.strip(), folder=math.floor(float(match[1]) * _SIZES[unit]))
        raise PlanError(
            f"{text!r} is no budget; write 3.4bpw for bits a weight, or 20GiB or 500MB for the whole folder"
        )

    def matrix_bytes(self, weights: int, overhead: int) -> int:
        """Bytes for the compressed matrices.

        Args:
            weights: weights that are compressed.
            overhead: bytes of the folder that are no compressed matrix.

        Raises:
            PlanError: what is kept as it is exceeds the budget already.
        """
        if self.rate is not None:
            return math.floor(self.rate * weights / 8)
        assert self.folder is not None
        if self.folder <= overhead:
            raise PlanError(
                f"{self.text} is too small: what is not compressed (embeddings, norms, routers, tokenizer) takes "
                f"{overhead:,} bytes"
            )
        return self.folder - overhead


@dataclass(frozen=True)
class BudgetPlan:
    """A plan and what explains it.

    Attributes:
        plan: the plan.
        allocation: totals, the price of a byte, the proven bound.
        losses: share of the loss by group name.
        importance: of the in-features, as it was measured with and has to be compressed with.
    """

    plan: Plan
    allocation: Allocation
    losses: Mapping[str, float]
    importance: Mapping[str, torch.Tensor]


def plan_for_bytes(
    groups: Sequence[Group],
    measured: Mapping[str, Measured],
    sensitivities: Sensitivities,
    nbytes: int,
    policy: str,
    rounds: int = ROUNDS,
) -> BudgetPlan:
    """The plan of least predicted loss within a number of bytes.

    Args:
        groups: what is compressed, in checkpoint order.
        measured: errors of every group's options, by name.
        sensitivities: loss at a relative squared error of 1.
        nbytes: bytes of all compressed matrices.
        policy: how the plan came about, for reports.
        rounds: solves at most where there are compensators.

    Raises:
        PlanError: the budget is too small.
    """
    together = units(groups)

    def options_at(price: float | None) -> list[list[list[Option]]]:
        """By unit, encoding, group."""
        return [
            [
                [
                    option(group, measured[group.name], sensitivities.costs[group.name], encoding, price)
                    for group in unit
                ]
                for encoding in measured[unit[0].name].errors
            ]
            for unit in together
        ]

    menu = options_at(None)
    found = _allocate(menu, nbytes)
    for _ in range(_PRICINGS):
        priced = [plain + better for plain, better in zip(options_at(None), options_at(found.price), strict=True)]
        again = _allocate(priced, nbytes)
        if again.loss >= found.loss:
            break
        menu, found = priced, again
    rows: dict[str, Row] = {}
    losses: dict[str, float] = {}
    for unit, choices, choice in zip(together, menu, found.choices, strict=True):
        for group, chosen in zip(unit, choices[choice], strict=True):
            rows[group.name] = _row(group, chosen.encoding, chosen.ranks)
            losses[group.name] = chosen.loss
    plan = Plan(tuple(rows[group.name] for group in groups), "budget", policy, rounds)
    return BudgetPlan(plan, found, losses, sensitivities.importance)


def _allocate(menu: Sequence[Sequence[Sequence[Option]]], nbytes: int) -> Allocation:
    sizes = [[sum(o.nbytes for o in choice) for choice in unit] for unit in menu]
    losses = [[sum(o.loss for o in choice) for choice in unit] for unit in menu]
    return allocate(sizes, losses, nbytes)


def _row(group: Group, encoding: Encoding, ranks: tuple[int, ...]) -> Row:
    return Row(group.name, group.role, group.kind, group.shape, ranks, encoding, GRID, group.transposed)
