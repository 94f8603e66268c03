"""The page: one HTML file with its style, script, pictures and numbers inside."""

from __future__ import annotations

import json
from collections import defaultdict
from importlib import resources
from math import nan
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from milo.report import evaluation, figures
from milo.report.colour import Scale
from milo.report.data import PARTS, Matrix, ReportData, RoleBytes
from milo.report.maps import Map, expert_maps, single_map
from milo.report.names import role_name

_CLASSES = dict(zip(PARTS, ("codes", "scales", "compensators", "kept"), strict=True))


def render(data: ReportData) -> str:
    """The whole report as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": size, "error": error_text, "percent": percent, "breakable": breakable}
    maps = expert_maps(data)
    singles = single_map(data)
    every = [*maps, *([singles] if singles else [])]
    return environment.from_string(_file("page.html.j2")).render(
        data=data,
        plan=data.checkpoint.plan,
        encodings=sorted({row.encoding for row in data.checkpoint.plan.rows}, key=str),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        numbers=_script_json({found.key: found.to_json() for found in every}),
        hero=_size_bars(data),
        parts=[(name, _CLASSES[name]) for name in PARTS],
        roles=_roles(data),
        experts=_quantities("experts", maps),
        singles=_quantities("singles", [singles]) if singles else [],
        layers=_layer_rows(maps),
        single_rows=_single_rows(singles) if singles else [],
        histograms=_histograms(data),
        worst=_worst(data),
        evaluation=_evaluation(data),
        mean_error=float(data.errors.mean()) if data.errors.size else nan,
    )


def size(nbytes: float) -> str:
    """Bytes for people, in the same units as the command line."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def error_text(value: float) -> str:
    """An error with four decimals, a dash where it is unknown."""
    return "–" if value != value else f"{value:.4f}"


def percent(value: float) -> str:
    """A share, one decimal."""
    return f"{100 * value:.1f} %"


def breakable(name: str) -> Markup:
    """A dotted name that may be broken after each dot."""
    return Markup(str(escape(name)).replace(".", ".<wbr>"))


def _file(name: str) -> str:
    return resources.files("milo.report").joinpath(name).read_text(encoding="utf-8")


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside `<script>`: `<` cannot end the element."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def _segments(role: RoleBytes, of: str = "") -> list[tuple[str, float, str]]:
    return [(_CLASSES[part], n, f"{of}{part}: {size(n)}") for part, n in role.parts.items()]


def _size_bars(data: ReportData) -> dict[str, Markup]:
    total = data.sixteen_bit_bytes
    parts = {part: sum(role.parts[part] for role in data.roles) for part in PARTS}
    return {
        "before": figures.bar("before", "Size at 16 bits", [("before", total, f"16 bits: {size(total)}")], total),
        "after": figures.bar(
            "after", "Size now", [(_CLASSES[part], n, f"{part}: {size(n)}") for part, n in parts.items()], total
        ),
    }


def _roles(data: ReportData) -> list[dict[str, Any]]:
    by_role: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in data.matrices:
        by_role[matrix.role].append(matrix)
    widest = max(role.nbytes for role in data.roles)
    rows = []
    for role in data.roles:
        matrices = by_role.get(role.role, [])
        ranks = [matrix.rank for matrix in matrices]
        rows.append(
            {
                "name": role_name(role.role),
                "role": role,
                "bar": figures.bar(f"bytes-{role.role}", f"Bytes of {role_name(role.role)}", _segments(role), widest),
                "share": role.nbytes / data.nbytes,
                "ranks": "–".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "",
                "error": float(np.mean([matrix.error for matrix in matrices])) if matrices else nan,
            }
        )
    return rows


def _quantities(section: str, maps: list[Map]) -> list[dict[str, Any]]:
    """Error and rank of a section's maps, each under one scale; a quantity that is nowhere known is left out."""
    shown = []
    for quantity in ("error", "rank"):
        values = np.concatenate([found.values(quantity).ravel() for found in maps]) if maps else np.array([])
        if not np.isfinite(values).any():
            continue
        scale = Scale.of(quantity, values)
        panels = [(found, figures.heat_map(found, quantity, scale)) for found in maps]
        shown.append({"name": quantity, "legend": figures.legend(f"{section}-{quantity}", scale), "panels": panels})
    return shown


def _layer_rows(maps: list[Map]) -> list[dict[str, Any]]:
    """Each layer of each expert map in numbers."""
    rows = []
    for found in maps:
        for i, layer in enumerate(found.rows):
            error, rank = (values[i][np.isfinite(values[i])] for values in (found.error, found.rank))
            low, mean, high = (error.min(), error.mean(), error.max()) if error.size else (nan, nan, nan)
            ranks = f"{rank.min():.0f}–{rank.max():.0f}"
            entry = {"layer": layer, "matrix": found.title, "low": low, "mean": mean, "high": high}
            rows.append({**entry, "rank": rank.mean(), "ranks": ranks})
    return rows


def _single_rows(found: Map) -> list[tuple[str, str, float, float]]:
    return [
        (name, found.columns[j], float(found.error[i, j]), float(found.rank[i, j]))
        for i, name in enumerate(found.rows)
        for j in range(len(found.columns))
        if np.isfinite(found.rank[i, j])
    ]


def _histograms(data: ReportData) -> list[tuple[str, int, Markup]]:
    if not data.errors_by_role:
        return []
    edges = data.error_edges()
    return [
        (role_name(role), len(found), figures.histogram(f"errors-{role}", role_name(role), found, edges))
        for role, found in data.errors_by_role.items()
    ]


def _worst(data: ReportData) -> list[tuple[Matrix, float]]:
    """The worst matrices, each with its error over the median of its role."""
    medians = {role: float(np.median(errors)) for role, errors in data.errors_by_role.items()}
    return [(matrix, matrix.error / medians[matrix.role]) for matrix in data.worst()]


def _evaluation(data: ReportData) -> dict[str, Any] | None:
    found = data.checkpoint.evaluation
    if found is None:
        return None
    divergence = found.get("divergence")
    picture = figures.percentiles(divergence) if isinstance(divergence, dict) else None
    return {
        "headline": evaluation.headline(found),
        "table": evaluation.measurements(found),
        "picture": picture,
        "others": evaluation.others(found),
    }
