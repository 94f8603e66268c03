"""From grids to maps: which numbers stand in which cell, before anybody draws them.

Experts get a map a projection, layers down and experts across. The matrices that a layer has once (attention,
shared experts, dense layers) share one map: matrices down, layers across.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milo.report.data import Grid, ReportData


@dataclass(frozen=True)
class Map:
    """A heat map's numbers.

    Attributes:
        key: unique in the report, usable as an HTML id.
        title: the projection, or what the map gathers.
        templates: matrix names, one for all rows or one a row; `{}` is the layer, `*` the expert.
        rows: labels of the rows.
        columns: labels of the columns.
        axes: what rows and columns are; the empty string where the labels say it themselves.
        layers: layer numbers along the axis that is `layer`.
        error: float64 `[rows, columns]`, NaN where unknown.
        rank: float64 likewise, NaN where there is no such matrix.
    """

    key: str
    title: str
    templates: Sequence[str]
    rows: Sequence[str]
    columns: Sequence[str]
    axes: tuple[str, str]
    layers: Sequence[int]
    error: NDArray[np.float64]
    rank: NDArray[np.float64]

    def values(self, quantity: str) -> NDArray[np.float64]:
        """`error` or `rank`."""
        return self.error if quantity == "error" else self.rank

    def to_json(self) -> dict[str, Any]:
        """What the page's script needs to name the cell under the pointer; unknown numbers are null."""
        return {
            "templates": list(self.templates),
            "layers": list(self.layers),
            "rows": len(self.rows),
            "columns": len(self.columns),
            "error": [None if v != v else round(v, 4) for v in self.error.ravel().tolist()],
            "rank": [None if v != v else int(v) for v in self.rank.ravel().tolist()],
        }


def expert_maps(data: ReportData) -> list[Map]:
    """One map a projection."""
    return [
        Map(
            f"experts-{index}",
            grid.label,
            [grid.template],
            [str(layer) for layer in grid.layers],
            [str(expert) for expert in range(grid.rank.shape[1])],
            ("layer", "expert"),
            grid.layers,
            grid.error,
            grid.rank,
        )
        for index, grid in enumerate(data.expert_grids)
    ]


def single_map(data: ReportData) -> Map | None:
    """All matrices that a layer has once, None if there are none."""
    grids = data.single_grids
    if not grids:
        return None
    layers = sorted({layer for grid in grids for layer in grid.layers})
    return Map(
        "singles",
        "one a layer",
        [grid.template for grid in grids],
        [grid.label for grid in grids],
        [str(layer) for layer in layers],
        ("", "layer"),
        layers,
        np.stack([_spread(grid, grid.error[:, 0], layers) for grid in grids]),
        np.stack([_spread(grid, grid.rank[:, 0], layers) for grid in grids]),
    )


def _spread(grid: Grid, values: NDArray[np.float64], layers: Sequence[int]) -> NDArray[np.float64]:
    by_layer = dict(zip(grid.layers, values.tolist(), strict=True))
    return np.array([by_layer.get(layer, nan) for layer in layers])
