"""The page's pictures as inline SVG.

Drawn here and not by matplotlib because a page is alive: colours follow the reader's theme, text keeps its size on a
phone, marks carry titles, cells answer to pointer and keys. A heat map's cells are one small image a theme (a pixel a
cell, fifteen thousand experts in a few kilobytes); the browser scales it without smoothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from milo.report.colour import THEMES, Scale, paint, png, ramp
from milo.report.maps import Map
from milo.report.names import quantity_name
from milo.report.svg import picture, tag

_PANEL = 288.0  # width of a plot that stands three abreast, without its labels
_ROW = 980.0  # width of one that needs a row to itself
_TOP = 5.0  # room above a map, for half of its first label
_AXIS = 18.0  # height of a line of labels


def heat_map(found: Map, quantity: str, scale: Scale) -> Markup:
    """One map; cells are `data-*` for the script, row and column labels thinned until they fit."""
    rows, columns = found.error.shape
    left = 8 + 7.0 * max(len(label) for label in found.rows)
    if found.axes[0]:
        width = _PANEL if columns <= 72 else max(_ROW, 4.0 * columns)
    else:
        width = max(min(_PANEL + 40 - left, 40.0 * columns), 4.0 * columns)
    cell = width / columns
    height = min(max(300 / rows, 5.0), 22.0) * rows
    line = height / rows
    children: list[Markup] = []
    values = found.values(quantity)
    for theme in THEMES:
        data = base64.b64encode(png(paint(scale, values, theme))).decode()
        children.append(
            tag(
                "image",
                class_=f"cells on-{theme}",
                href=f"data:image/png;base64,{data}",
                x=left,
                y=_TOP,
                width=width,
                height=height,
                preserveAspectRatio="none",
            )
        )
    children += [_gaps(left, width, height, rows, columns), tag("rect", tag("title", ""), class_="cursor", width=0)]
    children += _labels(found.rows, line, 11, lambda at: {"x": left - 6, "y": _TOP + at + 4, "text_anchor": "end"})
    children += _labels(
        found.columns, cell, 20, lambda at: {"x": left + at, "y": _TOP + height + 14, "text_anchor": "middle"}
    )
    known = values[np.isfinite(values)]
    span = f"from {_number(quantity, known.min())} to {_number(quantity, known.max())}" if known.size else "unknown"
    drawing = picture(
        f"{found.key}-{quantity}",
        f"{quantity.capitalize()} of {found.title}",
        f"Heat map, {rows} rows by {columns} columns: {quantity} {span}. The table below has the numbers.",
        left + width + 6,
        _TOP + height + _AXIS,
        *children,
    )
    about = {
        "role": "group",
        "aria_label": f"{quantity} of {found.title}; arrow keys step through the cells",
        "data_map": found.key,
        "data_box": f"{left:g} {_TOP:g} {width:g} {height:g}",
        "data_wide": "" if width > _PANEL else None,
    }
    return tag("div", drawing, class_="map", tabindex=0, **about)


def legend(key: str, scale: Scale) -> Markup:
    """The colours of a scale with its ends and middle in numbers."""
    width, height, left = 150.0, 8.0, 22.0
    children: list[Markup] = []
    for theme in THEMES:
        # A scale is linear in its legend, so equal steps of the map are equal steps of the bar.
        stops = [
            tag("stop", offset=float(i / 16), stop_color=f"rgb({r},{g},{b})")
            for i, (r, g, b) in enumerate(ramp(scale.quantity, theme, 17).tolist())
        ]
        gradient = tag("linearGradient", *stops, id=f"{key}-{theme}")
        bar = tag("rect", x=left, y=0, width=width, height=height, rx=2, fill=f"url(#{key}-{theme})")
        children.append(tag("g", gradient, bar, class_=f"on-{theme}"))
    for place, label in scale.ticks():
        children.append(tag("text", label, x=left + place * width, y=height + 14, text_anchor="middle"))
    name = quantity_name(scale.quantity)
    drawing = picture(f"{key}-legend", f"Legend: {name}", "Colour scale.", left * 2 + width, height + 18, *children)
    return tag("span", tag("span", name), drawing, class_="legend")


def bar(key: str, title: str, segments: Sequence[tuple[str, float, str]], total: float) -> Markup:
    """A stacked bar as wide as its place.

    Args:
        key: unique on the page.
        title: what it shows.
        segments: (class, length, what it is) from left to right.
        total: length of the whole place.
    """
    children, start = [], 0.0
    for kind, length, label in segments:
        if length > 0:
            # Percentages, so that the bar stretches and its ends do not.
            place = {"x": f"{100 * start / total:.3f}%", "width": f"{100 * length / total:.3f}%", "height": "100%"}
            children.append(tag("rect", tag("title", label), class_=kind, **place))
        start += length
    name = tag("title", title, id=f"{key}-title")
    about = tag("desc", "; ".join(label for _, length, label in segments if length > 0), id=f"{key}-desc")
    labels = f"{key}-title {key}-desc"
    return tag("svg", name, about, *children, class_="bar", id=key, role="img", aria_labelledby=labels, width="100%")


def histogram(key: str, label: str, errors: NDArray[np.float64], edges: NDArray[np.float64]) -> Markup:
    """How many matrices have which error, with the median marked.

    Args:
        key: unique on the page.
        label: whose errors.
        errors: at least one.
        edges: of the bins, ascending; the same for every panel that is compared.
    """
    counts = np.histogram(errors, edges)[0]
    width, height, top = _PANEL, 96.0, 18.0
    step, tallest = width / len(counts), max(1, int(counts.max()))
    children: list[Markup] = []
    for i, count in enumerate(counts.tolist()):
        if count:
            tall = max(1.5, height * count / tallest)
            what = tag("title", f"{count:,} matrices from {edges[i]:.4f} to {edges[i + 1]:.4f}")
            place = {"x": i * step + 0.5, "y": top + height - tall, "width": step - 1, "height": tall}
            children.append(tag("rect", what, class_="column", **place))
    median = float(np.median(errors))
    at = width * (median - edges[0]) / (edges[-1] - edges[0])
    side = "end" if at > width * 0.6 else "start"
    children.append(tag("line", class_="median", x1=at, x2=at, y1=6, y2=top + height))
    where = at - 5 if side == "end" else at + 5
    children.append(tag("text", f"median {median:.4f}", class_="strong", x=where, y=12, text_anchor=side))
    children.append(tag("line", class_="axis", x1=0, x2=width, y1=top + height + 0.5, y2=top + height + 0.5))
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = edges[0] + share * (edges[-1] - edges[0])
        children.append(tag("text", f"{value:.3f}", x=share * width, y=top + height + 14, text_anchor=anchor))
    about = f"Histogram of {len(errors):,} errors from {errors.min():.4f} to {errors.max():.4f}, median {median:.4f}."
    return picture(key, f"Errors of {label}", about, width + 1, top + height + _AXIS, *children)


def percentiles(divergence: Mapping[str, Any]) -> Markup | None:
    """KL divergence at its percentiles on a logarithmic axis; None if there is nothing above zero to draw."""
    names = {"kl_p50": "median", "kl": "mean", "kl_p90": "90th percentile", "kl_p99": "99th percentile"}
    found = {name: divergence.get(key) for key, name in names.items()}
    points = {name: float(v) for name, v in found.items() if isinstance(v, (int, float)) and v > 0}
    if len(points) < 2:
        return None
    low = 10.0 ** np.floor(np.log10(min(points.values())))
    high = 10.0 ** np.ceil(np.log10(max(points.values())))
    width, left, line = 180.0, 108.0, 22.0
    bottom = line * len(points)

    def x(value: float) -> float:
        return left + width * float(np.log(value / low) / np.log(high / low))

    children: list[Markup] = []
    for decade in np.arange(round(np.log10(low)), round(np.log10(high)) + 1).tolist():
        at = x(10.0**decade)
        children.append(tag("line", class_="axis", x1=at, x2=at, y1=0, y2=bottom))
        children.append(tag("text", f"{10.0**decade:g}", x=at, y=bottom + 14, text_anchor="middle"))
    for i, (name, value) in enumerate(points.items()):
        y = line * (i + 0.5)
        children.append(tag("text", name, x=left - 12, y=y + 4, text_anchor="end"))
        children.append(tag("circle", tag("title", f"{name}: {value:.5f} nats"), class_="dot", cx=x(value), cy=y, r=5))
    about = ", ".join(f"{name} {value:.5f}" for name, value in points.items())
    return picture("kl", "KL divergence, nats a token", f"On a logarithmic axis: {about}.", 308, bottom + 18, *children)


def _gaps(left: float, width: float, height: float, rows: int, columns: int) -> Markup:
    """Thin lines in the page's colour between cells that are large enough to spare them."""
    path = ""
    if min(width / columns, height / rows) >= 5:
        path += "".join(f"M{left + width * i / columns:.2f} {_TOP:g}v{height:g}" for i in range(1, columns))
        path += "".join(f"M{left:g} {_TOP + height * i / rows:.2f}h{width:.2f}" for i in range(1, rows))
    return tag("path", class_="gaps", d=path)


def _labels(names: Sequence[str], step: float, room: float, place: Any) -> list[Markup]:
    """Every name whose turn it is, with 1, 2, 4, 8, ... between them so that they do not touch."""
    every = 1
    while step * every < room:
        every *= 2
    return [tag("text", name, **place(step * (index + 0.5))) for index, name in enumerate(names) if index % every == 0]


def _number(quantity: str, value: float) -> str:
    return f"{value:.0f}" if quantity == "rank" else f"{value:.4f}"
