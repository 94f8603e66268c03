"""What a report shows: sizes, and error and rank of every matrix, gathered from a compressed folder's own files.

The plan knows names, shapes, ranks and bytes; `milo_report.json` knows errors and how the folder was made (a folder
that another program saved again has none, and then errors are NaN). No weight is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milo.checkpoint.compressed import REPORT, CompressedCheckpoint
from milo.checkpoint.inventory import Kind
from milo.checkpoint.roles import LAYER_INDEX, Role, role_of
from milo.errors import CheckpointError
from milo.plan.plan import Row

# What a stored byte is for. Compensators are what MiLo adds, so figures give them the accent.
PARTS = ("codes", "scales and zeros", "compensators", "uncompressed")


@dataclass(frozen=True)
class Matrix:
    """One compressed matrix.

    Attributes:
        name: checkpoint name without `.weight`; a stack's member carries `[i]`.
        role: what it does.
        shape: `(N, K)`.
        rank: of its compensator.
        error: `‖W − Ŵ‖/‖W‖`, NaN if unknown.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    rank: int
    error: float


@dataclass(frozen=True)
class Grid:
    """The same matrix in every layer (and for every expert): what a heat map shows.

    Attributes:
        template: its name, `{}` for the layer and `*` for the expert.
        label: the template's last part, or as much of its tail as tells it from its like.
        role: role of the matrices.
        layers: the layers' numbers, ascending; `(0,)` where the name has none.
        error: float64 `[layers, experts]`, NaN if unknown.
        rank: float64 likewise, NaN where a layer has fewer experts.
    """

    template: str
    label: str
    role: Role
    layers: tuple[int, ...]
    error: NDArray[np.float64]
    rank: NDArray[np.float64]


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of one role.

    Attributes:
        role: the role.
        matrices: compressed matrices; 0 for a role that is kept.
        weights: numbers in its tensors.
        parts: bytes by `PARTS`.
    """

    role: Role
    matrices: int
    weights: int
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else nan


@dataclass(frozen=True)
class ReportData:
    """Everything a page or a figure needs; `made` is `milo_report.json` without its list of matrices."""

    checkpoint: CompressedCheckpoint
    made: Mapping[str, Any]
    matrices: Sequence[Matrix]
    grids: Sequence[Grid]
    roles: Sequence[RoleBytes]

    @property
    def title(self) -> str:
        """The source's name without its path."""
        source = self.checkpoint.base_model or str(self.checkpoint.folder.resolve())
        return source.rstrip("/").rsplit("/", 1)[-1]

    @property
    def expert_grids(self) -> list[Grid]:
        return [grid for grid in self.grids if grid.rank.shape[1] > 1]

    @property
    def single_grids(self) -> list[Grid]:
        return [grid for grid in self.grids if grid.rank.shape[1] == 1]

    @cached_property
    def errors(self) -> NDArray[np.float64]:
        """Errors that are known, float64 `[matrices]`."""
        errors = np.array([matrix.error for matrix in self.matrices])
        return errors[np.isfinite(errors)]

    @cached_property
    def errors_by_role(self) -> dict[Role, NDArray[np.float64]]:
        """Known errors of each role, the role with most matrices first."""
        found: dict[Role, list[float]] = defaultdict(list)
        for matrix in self.matrices:
            if np.isfinite(matrix.error):
                found[matrix.role].append(matrix.error)
        return {role: np.array(errors) for role, errors in sorted(found.items(), key=lambda item: -len(item[1]))}

    def error_edges(self, bins: int = 40) -> NDArray[np.float64]:
        """Edges of a histogram that holds every known error, the same for all roles."""
        low, high = float(self.errors.min()), float(self.errors.max())
        margin = max(0.02 * (high - low), 1e-4)
        return np.linspace(low - margin, high + margin, bins + 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(role.nbytes for role in self.roles)

    @property
    def sixteen_bit_bytes(self) -> int:
        """What the same tensors take with compressed matrices at 16 bits and the others as they are."""
        kept = sum(role.parts[PARTS[3]] for role in self.roles)
        return 2 * sum(role.weights for role in self.roles if role.matrices) + kept

    def worst(self, count: int = 12) -> list[Matrix]:
        """The matrices with the largest errors, worst first."""
        known = [matrix for matrix in self.matrices if np.isfinite(matrix.error)]
        return sorted(known, key=lambda matrix: -matrix.error)[:count]


def gather(checkpoint: CompressedCheckpoint) -> ReportData:
    """Read what a report shows.

    Args:
        checkpoint: an opened, hence checked, folder.

    Raises:
        CheckpointError: `milo_report.json` is unreadable or damaged.
    """
    made = dict(checkpoint.report) if checkpoint.has_report else {}
    try:
        errors = {(entry["name"], entry.get("member")): float(entry["error"]) for entry in made.pop("matrices", [])}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.folder / REPORT} is damaged: {error!r}; delete it to do without") from error
    matrices: list[Matrix] = []
    stacked: dict[str, list[tuple[Row, list[Matrix]]]] = defaultdict(list)
    for row in checkpoint.plan.rows:
        members = list(_members(row, errors))
        matrices += members
        stacked[LAYER_INDEX.sub("{}", row.name, count=1)].append((row, members))
    single = {template: len(rows[0][1]) == 1 for template, rows in stacked.items()}
    labels = _labels([t for t in stacked if single[t]]) | _labels([t for t in stacked if not single[t]])
    grids = [_grid(template, labels[template], rows) for template, rows in stacked.items()]
    return ReportData(checkpoint, made, matrices, grids, _role_bytes(checkpoint))


def _members(row: Row, errors: Mapping[tuple[str, int | None], float]) -> Iterator[Matrix]:
    names = row.matrices()
    for member, rank in enumerate(row.ranks):
        if row.kind is Kind.STACK:
            name, error = f"{row.name}[{member}]", errors.get((row.name, member), nan)
        else:
            name, error = names[member], errors.get((names[member], None), nan)
        yield Matrix(name, row.role, row.shape, rank, error)


def _grid(template: str, label: str, rows: Sequence[tuple[Row, Sequence[Matrix]]]) -> Grid:
    numbered = []
    for row, members in rows:
        match = LAYER_INDEX.search(row.name)
        numbered.append((int(match[1]) if match else 0, members))
    numbered.sort(key=lambda item: item[0])
    width = max(len(members) for _, members in numbered)
    error = np.full((len(numbered), width), nan)
    rank = np.full((len(numbered), width), nan)
    for i, (_, members) in enumerate(numbered):
        error[i, : len(members)] = [matrix.error for matrix in members]
        rank[i, : len(members)] = [matrix.rank for matrix in members]
    return Grid(template, label, rows[0][0].role, tuple(layer for layer, _ in numbered), error, rank)


def _labels(templates: Sequence[str]) -> dict[str, str]:
    """The shortest tail of each name that no other name shares."""
    labels = {}
    for template in templates:
        parts = [part for part in template.split(".") if part not in ("{}", "*")]
        for length in range(1, len(parts) + 1):
            tail = parts[-length:]
            others = (t for t in templates if t != template)
            if not any([p for p in other.split(".") if p not in ("{}", "*")][-length:] == tail for other in others):
                break
        labels[template] = ".".join(tail)
    return labels


def _role_bytes(checkpoint: CompressedCheckpoint) -> list[RoleBytes]:
    matrices: dict[Role, int] = defaultdict(int)
    weights: dict[Role, int] = defaultdict(int)
    parts: dict[Role, dict[str, int]] = defaultdict(lambda: dict.fromkeys(PARTS, 0))
    planned: set[str] = set()
    for row in checkpoint.plan.rows:
        matrices[row.role] += len(row.ranks)
        weights[row.role] += row.parameters
        for name, spec in row.tensors().items():
            planned.add(name)
            parts[row.role][_part(name.rpartition(".")[2])] += spec.nbytes
    for name, info in checkpoint.tensors.items():
        if name not in planned:
            role = role_of(name, info.shape)
            role = Role.OTHER if role.compressed else role  # it was kept, so it is not what its name suggests
            weights[role] += prod(info.shape)
            parts[role][PARTS[3]] += info.nbytes
    found = [RoleBytes(role, matrices[role], weights[role], parts[role]) for role in parts]
    return sorted(found, key=lambda entry: -entry.nbytes)


def _part(suffix: str) -> str:
    if suffix.startswith("lowrank"):
        return PARTS[2]
    return PARTS[0] if suffix.startswith("weight_packed") else PARTS[1]
