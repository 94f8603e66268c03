"""The saved evaluation as tables, whatever else a later `milo eval` adds to it.

Known measurements get their names, units and an order; an unknown key is shown as it is if it is simple: a number or
text, a flat object, a list of flat objects, or an object of flat objects. Anything deeper is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milo.checkpoint.evaluation import task_rows

Scalar = str | int | float | bool | None
_KNOWN = frozenset(("model", "text", "recipe", "size", "contiguous", "sliding", "original", "divergence", "tasks"))


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it holds.
        head: column names; empty for a table of names and values.
        rows: cells, all rows equally long.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def measurements(evaluation: Mapping[str, Any]) -> Table | None:
    """What `milo eval` measures on a text; None if it was given none."""
    rows = []
    for key in ("contiguous", "sliding"):
        found = _object(evaluation.get(key))
        if "ppl" in found:
            how = "side by side" if key == "contiguous" else f"every {show(found.get('stride'))} tokens"
            rows.append((f"Perplexity, windows of {show(found.get('window'))}, {how}", show(found["ppl"])))
    found = _object(evaluation.get("divergence"))
    if "kl" in found:
        error = f" ± {found['kl_se']:.5f}" if found.get("kl_se") is not None else ""
        rows.append(("KL divergence from the original, nats a token", f"{found['kl']:.5f}{error}"))
    if "top1" in found:
        rows.append(("Same first choice as the original", f"{100 * found['top1']:.2f} %"))
    routing = [layer for layer in found.get("routing") or () if _flat(layer) and "same_set" in layer]
    if routing:
        shares = [layer["same_set"] for layer in routing]
        worst = min(routing, key=lambda layer: layer["same_set"])
        rows.append(("Tokens that keep all their experts, mean of layers", f"{100 * sum(shares) / len(shares):.2f} %"))
        rows.append((f"… in {worst.get('layer')}, the worst", f"{100 * worst['same_set']:.2f} %"))
    tokens = _object(evaluation.get("contiguous")).get("tokens")
    if tokens is not None:
        rows.append(("Tokens scored", show(tokens)))
    return Table(f"Measured on {evaluation.get('text') or 'an unnamed text'}", (), rows) if rows else None


def tasks(evaluation: Mapping[str, Any]) -> Table | None:
    """Task scores beside the original's; None if no task was run. Parts of a group are left out."""
    rows = task_rows(evaluation)
    head = ("task and metric", "this model", "original", "difference, paired")
    return Table("Tasks, through lm-eval", head, rows) if rows else None


def headline(evaluation: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name, value) of the one number that says most: the divergence, else the perplexity."""
    divergence, contiguous = _object(evaluation.get("divergence")), _object(evaluation.get("contiguous"))
    if "kl" in divergence:
        return "KL from the original, nats", show(divergence["kl"])
    return ("perplexity", show(contiguous["ppl"])) if "ppl" in contiguous else None


def others(evaluation: Mapping[str, Any]) -> list[Table]:
    """Tables of the keys that `measurements` does not know, in their order."""
    loose = [(words(key), show(value)) for key, value in evaluation.items() if key not in _KNOWN and _scalar(value)]
    tables = [scores] if (scores := tasks(evaluation)) is not None else []
    if loose:
        tables.append(Table("Also recorded", (), loose))
    for key, value in evaluation.items():
        if key not in _KNOWN and not _scalar(value) and (table := _table(words(key), value)) is not None:
            tables.append(table)
    return tables


def _table(title: str, value: Any) -> Table | None:
    if isinstance(value, Mapping) and value:
        if all(map(_scalar, value.values())):
            return Table(title, (), [(words(name), show(item)) for name, item in value.items()])
        if all(_flat(item) for item in value.values()):
            head = list(dict.fromkeys(name for item in value.values() for name in item))
            rows = [(str(name), *(show(item.get(column)) for column in head)) for name, item in value.items()]
            return Table(title, ("", *map(words, head)), rows)
    if isinstance(value, Sequence) and value and all(_flat(item) for item in value):
        head = list(dict.fromkeys(name for item in value for name in item))
        return Table(title, [words(name) for name in head], [[show(item.get(c)) for c in head] for item in value])
    return None


def show(value: Scalar) -> str:
    """A number with the digits that people read, anything else as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def words(name: str) -> str:
    """A key for people: `kl_p99` as `kl p99`."""
    return str(name).replace("_", " ")


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _flat(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_scalar, value.values()))
