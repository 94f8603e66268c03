"""`milo report`: a compressed folder as a page and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.hub import find_model
from milo.checkpoint.writer import explained, write_atomically
from milo.cli.console import say, size
from milo.cli.options import FolderArgument


def report(
    folder: FolderArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option("--png", help="Also draw the figures as PNG into this folder.")] = None,
) -> None:
    """Draw a compressed folder: sizes, error and rank of every matrix, the evaluation. One HTML file, no network."""
    from milo.report.data import gather  # matplotlib and jinja2 are slow to import and nobody else needs them
    from milo.report.page import render
    from milo.report.plots import write_figures

    data = gather(CompressedCheckpoint(find_model(folder)))
    page = render(data)
    with explained(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    say(f"{output}: {len(data.matrices):,} matrices, {size(len(page.encode()))}")
    for path in write_figures(data, png) if png else []:
        say(str(path))
    if data.checkpoint.evaluation is None:
        say(f"no evaluation in it yet: milo eval {folder} --text FILE --save")
