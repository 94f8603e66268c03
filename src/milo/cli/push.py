"""`milo push`: a compressed folder to a model hub."""

from __future__ import annotations

from typing import Annotated

import typer

from milo.checkpoint.publish import publish
from milo.cli.console import say
from milo.cli.options import FolderArgument


def push(
    folder: FolderArgument,
    repo: Annotated[str, typer.Argument(help="Name on the hub, e.g. me/mixtral-milo.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Another hub than huggingface.co.")] = None,
) -> None:
    """Upload a compressed folder, after checking that it is whole; makes the repository if there is none."""
    say(publish(folder, repo, private=private, endpoint=endpoint))
