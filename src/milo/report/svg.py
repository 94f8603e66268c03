"""SVG elements as strings, everything escaped."""

from __future__ import annotations

from markupsafe import Markup, escape

Value = str | int | float


def tag(name: str, *children: str, **attributes: Value | None) -> Markup:
    """One element.

    Args:
        name: the element's name.
        children: elements (`Markup`, taken as they are) or text (escaped).
        attributes: `_` stands for `-`, a trailing `_` is dropped (`class_`); None leaves one out, floats are
            written with two decimals.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    if not children:
        return Markup("".join(parts) + "/>")
    return Markup("".join(parts) + ">" + "".join(map(escape, children)) + f"</{name}>")


def picture(key: str, title: str, description: str, width: float, height: float, *children: str) -> Markup:
    """An `<svg>` that assistive technology reads as an image with a title and a description.

    Args:
        key: unique on the page; its parts' ids begin with it.
        title: what the picture shows, in a few words.
        description: what it says.
        width: in CSS pixels; the picture is not scaled, so text keeps its size on every screen.
        height: likewise.
        children: its elements.
    """
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *children,
        id=key,
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
        width=width,
        height=height,
        viewBox=f"0 0 {width:g} {height:g}",
    )
