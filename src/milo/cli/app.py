"""The `milo` command."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

import milo
from milo.cli.compress import plan, profile, quantize
from milo.cli.console import err, say
from milo.cli.demo import demo
from milo.cli.doctor import doctor
from milo.cli.frontier import frontier
from milo.cli.measure import evaluate, generate, inspect
from milo.cli.push import push
from milo.cli.report import report
from milo.cli.serve import serve
from milo.errors import MiloError

app = typer.Typer(
    name="milo",
    help="INT3 weights plus low-rank compensators for Mixture-of-Experts models, without calibration data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"milo {milo.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(demo)
app.command()(plan)
app.command()(profile)
app.command()(quantize)
app.command("eval")(evaluate)
app.command()(frontier)
app.command()(inspect)
app.command()(report)
app.command()(generate)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(push)
app.command()(doctor)


def main() -> None:
    """Entry point: MiLo's own errors without a traceback (exit 1), Ctrl-C cleanly (exit 130)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # ours are shown instead
    warnings.filterwarnings("ignore", category=FutureWarning)
    signal.signal(signal.SIGINT, _interrupted)
    try:
        app()
    except MiloError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:  # `milo plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _interrupted(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C: leave at once. An exception would first wait for the pieces that threads are still solving."""
    err.show_cursor(True)
    err.print("\ninterrupted; nothing half-written looks finished; `milo quantize` run again goes on where it stopped")
    sys.stdout.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
