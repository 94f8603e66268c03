"""From a source and a number of bytes to a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping

from milo.errors import PlanError
from milo.pipeline.compress import lay_out_checkpoint, quantization_config, side_files
from milo.pipeline.planning import Source
from milo.plan.budget import ROUNDS, Budget, BudgetPlan, plan_for_bytes
from milo.plan.menu import Measured
from milo.plan.plan import Plan
from milo.plan.sensitivity import Sensitivities

# What the report and the model card take at most, a matrix and in all: they are written last, but must fit as well.
_REPORT_ENTRY = 512
_REPORT_REST = 16_384


def plan_budget(
    source: Source,
    budget: Budget,
    measured: Mapping[str, Measured],
    sensitivities: Sensitivities,
    origin: str,
    rounds: int = ROUNDS,
) -> BudgetPlan:
    """The plan of least predicted loss within a budget; if that is a folder's, an untied head may be compressed, too.

    Args:
        source: an opened source.
        budget: bits a compressed weight, or bytes of the folder.
        measured: errors of every option (`measure_menu`).
        sensitivities: of every group.
        origin: where the sensitivities come from, for reports.
        rounds: solves at most where there are compensators.

    Raises:
        PlanError: the budget is too small.
    """
    policy = f"{budget.text}, {origin} sensitivities"
    groups, candidates = source.inventory.groups, source.inventory.candidates
    weights = sum(group.parameters for group in groups)
    if budget.folder is None:
        return plan_for_bytes(groups, measured, sensitivities, budget.matrix_bytes(weights, 0), policy, rounds)
    found: list[BudgetPlan] = []
    failed: PlanError | None = None
    for chosen in [groups] if candidates == groups else [groups, candidates]:
        # What is not a matrix does not depend on the choices, but for some digits in headers and reports.
        rich = plan_for_bytes(chosen, measured, sensitivities, 1 << 62, policy, rounds)
        try:
            nbytes = budget.matrix_bytes(weights, folder_overhead(source, rich.plan))
            found.append(plan_for_bytes(chosen, measured, sensitivities, nbytes, policy, rounds))
        except PlanError as error:
            failed = error
    if failed and not found:
        raise failed
    return min(found, key=lambda each: each.allocation.loss)


def folder_overhead(source: Source, plan: Plan) -> int:
    """Bytes of an output folder that are no compressed matrix: kept tensors, headers, side files, reports (bounded)."""
    shards = lay_out_checkpoint(source.checkpoint, source.inventory, plan)
    files = sum(shard.nbytes for shard in shards) - plan.nbytes
    files += sum(path.stat().st_size for path in side_files(source.checkpoint.folder))
    names = sum(len(name) + 96 for name, _ in plan.tensors()) if len(shards) > 1 else 0  # the index of the shards
    config = len(
        json.dumps({**source.checkpoint.config, "quantization_config": quantization_config(plan, None)}, indent=2)
    )
    matrices = sum(len(row.ranks) for row in plan.rows)
    return files + names + 2 * config + _REPORT_ENTRY * matrices + _REPORT_REST
