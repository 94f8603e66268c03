"""What the commands share: the console, progress bars with peak memory, units, JSON output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from milo.pipeline.memory import host_peak

# Tables and results go to stdout, progress and errors to stderr, so that --json can be piped.
out = Console()
err = Console(stderr=True)


class _MemoryColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"peak {size(host_peak())}", style="dim")


def say(text: str, console: Console = out) -> None:
    """A line of text as it is: no markup, and no line breaks of ours, which would cut names and paths in a pipe."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar(total: float = 1.0, counted: bool = False) -> Iterator[Any]:
    """A progress bar on stderr; yields `update(done, message)`.

    Args:
        total: what `done` runs up to.
        counted: show `done/total` as numbers.
    """
    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
    ]
    if counted:
        columns.append(MofNCompleteColumn())
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), _MemoryColumn()]
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=total)
        begun = False

        def update(done: float, message: str) -> None:
            nonlocal begun
            if not begun:  # where work begins, which for a resumed run is not zero and says nothing of its speed
                progress.reset(task, completed=int(done))
                begun = True
            progress.update(task, completed=done, description=message)

        yield update


def size(nbytes: float) -> str:
    """Bytes for people: `1.25 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    raise AssertionError


def print_json(data: Any) -> None:
    """Machine-readable output: plain JSON on stdout, no colour and no wrapping."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
