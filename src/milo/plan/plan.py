"""The plan itself: explicit, serialisable, with exact bytes.

One `Row` a group of matrices says everything the solver and the loader need. In JSON (where it travels in
`config.json`) rows that differ only in the layer's number are one entry, and ranks are run lengths (`"16x8 0x56"`),
so that a model of forty thousand matrices has a plan of a few kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any

from milo.checkpoint.inventory import Group, Inventory, Kind
from milo.checkpoint.roles import LAYER_INDEX, Role
from milo.errors import FormatError
from milo.format.matrix import Encoding, TensorSpec
from milo.plan.ranks import Evidence, assign_ranks
from milo.plan.recipe import GRIDS, Recipe, hidden_size


@dataclass(frozen=True)
class Row:
    """What happens to one group of matrices.

    Attributes:
        name: as `Group.name`; `*` stands for the expert's number.
        role: role of the matrices.
        kind: how they stand in the checkpoint.
        shape: `(N, K)` of each.
        ranks: rank of each member.
        encoding: how they are written.
        grid: `rtn`, `hqq` or `mse`.
        transposed: the source holds `[E, K, N]` (stacks only).
    """

    name: str
    role: Role
    kind: Kind
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    encoding: Encoding
    grid: str
    transposed: bool = False

    @property
    def parameters(self) -> int:
        return len(self.ranks) * prod(self.shape)

    def matrices(self) -> list[str]:
        """Names of the stored matrices: one an expert, or the single matrix or stack."""
        if self.kind is Kind.EXPERTS:
            return [self.name.replace("*", str(i)) for i in range(len(self.ranks))]
        return [self.name]

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor on disk with its full name."""
        n, k = self.shape
        if self.kind is Kind.STACK:
            specs = self.encoding.tensors((len(self.ranks), n, k), sum(self.ranks))
            return {f"{self.name}.{suffix}": spec for suffix, spec in specs.items()}
        return {
            f"{matrix}.{suffix}": spec
            for matrix, rank in zip(self.matrices(), self.ranks, strict=True)
            for suffix, spec in self.encoding.tensors((n, k), rank).items()
        }

    @cached_property
    def nbytes(self) -> int:
        """Exact bytes on disk, container headers excluded."""
        return sum(spec.nbytes for spec in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Plan:
    """What happens to every matrix.

    Attributes:
        rows: one a group, in checkpoint order.
        recipe: name of the recipe it was made from.
        policy: the rank policy.
        rounds: solves at most.
        clipped: matrices whose policy asked for more rank than `min(N, K)`.
    """

    rows: tuple[Row, ...]
    recipe: str
    policy: str
    rounds: int
    clipped: int = 0

    @property
    def parameters(self) -> int:
        """Weights that are compressed."""
        return sum(row.parameters for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Exact bytes of all compressed matrices on disk."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters

    @cached_property
    def by_name(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    def tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        for row in self.rows:
            yield from row.tensors().items()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; see `docs/format.md`."""
        return {
            "recipe": self.recipe,
            "policy": self.policy,
            "rounds": self.rounds,
            "clipped": self.clipped,
            "matrices": _merge_layers(self.rows),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`.

        Raises:
            FormatError: the object is not a plan.
        """
        try:
            rows = tuple(row for entry in data["matrices"] for row in _expand(entry))
            plan = cls(rows, str(data["recipe"]), str(data["policy"]), int(data["rounds"]), int(data["clipped"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"the plan in config.json is damaged: {error!r}") from error
        if len({row.name for row in rows}) != len(rows):
            raise FormatError("the plan in config.json names a matrix twice")
        return plan

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, which every shard repeats."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def make_plan(inventory: Inventory, recipe: Recipe, config: Mapping[str, Any], evidence: Evidence) -> Plan:
    """Apply a recipe to an inventory.

    Raises:
        PlanError: the rank policy is unknown or lacks what it needs.
    """
    ranks, clipped = assign_ranks(inventory.groups, recipe.ranks, hidden_size(config), evidence)
    rows = tuple(_row(group, ranks[group.name], recipe) for group in inventory.groups)
    return Plan(rows, recipe.name, recipe.ranks, recipe.rounds, clipped)


def _row(group: Group, ranks: Sequence[int], recipe: Recipe) -> Row:
    return Row(
        group.name,
        group.role,
        group.kind,
        group.shape,
        tuple(ranks),
        recipe.encoding,
        recipe.grid,
        group.transposed,
    )


def _split_layer(name: str) -> tuple[str, int | None]:
    """`model.layers.3.mlp` to `("model.layers.{}.mlp", 3)`: the first number is the layer's."""
    match = LAYER_INDEX.search(name)
    if match is None:
        return name, None
    return name[: match.start()] + "{}" + name[match.end() :], int(match[1])


def _merge_layers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for row in rows:
        template, layer = _split_layer(row.name)
        fields: dict[str, Any] = {
            "name": template,
            "role": str(row.role),
            "kind": str(row.kind),
            "shape": list(row.shape),
            "count": len(row.ranks),
            "grid": row.grid,
            **asdict(row.encoding),
        }
        if row.transposed:
            fields["transposed"] = True
        key = json.dumps(fields)
        entry = entries.setdefault(key, {**fields, "layers": [], "ranks": []})
        entry["layers"].append(layer)
        entry["ranks"].extend(row.ranks)
    for entry in entries.values():
        entry["layers"] = _ranges(entry["layers"])
        entry["ranks"] = _run_lengths(entry["ranks"])
    return list(entries.values())


def _expand(entry: Mapping[str, Any]) -> Iterator[Row]:
    encoding = Encoding(**{key: entry[key] for key in Encoding.__dataclass_fields__})
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    count, layers = int(entry["count"]), _parse_ranges(entry["layers"])
    ranks = _parse_run_lengths(entry["ranks"])
    if entry["grid"] not in GRIDS:
        raise ValueError(f"unknown grid {entry['grid']!r}")
    if min(shape) < 1 or count < 1 or len(ranks) != count * len(layers) or max(ranks) > min(shape):
        raise ValueError(f"ranks, layers and shape of {entry['name']} do not fit together")
    for position, layer in enumerate(layers):
        name = entry["name"] if layer is None else entry["name"].replace("{}", str(layer))
        part = tuple(ranks[position * count : (position + 1) * count])
        transposed = bool(entry.get("transposed", False))
        yield Row(name, Role(entry["role"]), Kind(entry["kind"]), shape, part, encoding, entry["grid"], transposed)


def _ranges(layers: Sequence[int | None]) -> str:
    """`[0, 1, 2, 7]` to `"0-2 7"`; a matrix outside any layer has the empty string."""
    numbers = [n for n in layers if n is not None]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _parse_ranges(text: str) -> list[int | None]:
    if text == "":
        return [None]
    layers: list[int | None] = []
    for run in text.split(" "):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", run)
        if match is None:
            raise ValueError(f"bad layer range {run!r}")
        layers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return layers


def _run_lengths(ranks: Sequence[int]) -> str:
    runs = ((rank, len(list(run))) for rank, run in groupby(ranks))
    return " ".join(f"{rank}x{length}" if length > 1 else str(rank) for rank, length in runs)


def _parse_run_lengths(text: str) -> list[int]:
    ranks: list[int] = []
    for run in text.split(" "):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", run)
        if match is None:
            raise ValueError(f"bad run of ranks {run!r}")
        ranks.extend([int(match[1])] * int(match[2] or 1))
    return ranks
