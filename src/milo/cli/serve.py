"""`milo serve`: `vllm serve` with the right defaults, after checking what can be known before a weight is read."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated

import typer

from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.hub import find_model
from milo.cli.console import err, say
from milo.cli.options import FolderArgument
from milo.errors import MiloError
from milo.integrations.serving import (
    cards,
    check_kernels,
    check_memory,
    default_options,
    given_options,
    missing,
    weights,
)

_VLLM = "vllm.entrypoints.cli.main"  # what the `vllm` command runs; this way it is this interpreter's


def serve(
    context: typer.Context,
    folder: FolderArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the `vllm serve` command, leave.")] = False,
) -> None:
    """Serve a compressed folder with vLLM. Every other option goes to `vllm serve` as it is."""
    if folder.startswith("-"):
        raise typer.BadParameter(f"{folder} stands where DIR should: milo serve DIR [options of vllm serve]")
    checkpoint = CompressedCheckpoint(find_model(folder))
    check_kernels(checkpoint.plan)
    given = given_options(context.args)
    options = [*default_options(checkpoint, folder, given), *context.args]
    command = ["serve", str(checkpoint.folder), *options]
    present = cards()
    problems = missing(present)
    if problems and not dry_run:
        raise MiloError("; ".join(problems))
    if present:
        needed = weights(checkpoint.plan, checkpoint.tensors.values(), checkpoint.config)
        say(check_memory(needed, given, present), err)
    for problem in problems:
        say(f"not here: {problem}", err)
    if dry_run:
        say(shlex.join(["vllm", *command]))
        return
    say(f"starting {shlex.join(['vllm', *command])}", err)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", _VLLM, *command])  # signals and exit code are vLLM's own
