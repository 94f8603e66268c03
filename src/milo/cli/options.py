"""Options that several commands share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from milo.errors import PlanError
from milo.plan.recipe import PRESETS, Recipe, custom_recipe

ModelArgument = Annotated[str, typer.Argument(help="Model folder or hub name.", metavar="MODEL")]
FolderArgument = Annotated[str, typer.Argument(help="Compressed folder.", metavar="DIR")]
RecipeOption = Annotated[str, typer.Option("--recipe", help=f"One of {', '.join(PRESETS)}.")]
RanksOption = Annotated[
    str | None,
    typer.Option("--ranks", help="Rank policy instead of the recipe's, e.g. dense:512+kurtosis:16."),
]
BitsOption = Annotated[int | None, typer.Option("--bits", help="Bits of a weight code: 2, 3, 4, 5, 6 or 8.")]
GroupOption = Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale: 32, 64 or 128.")]
GridOption = Annotated[str | None, typer.Option("--grid", help="rtn, hqq or mse.")]
RoundsOption = Annotated[int | None, typer.Option("--rounds", help="Solves of the alternation at most.")]
FactorOption = Annotated[str | None, typer.Option("--factor", help="Compensator dtype: int3, int8 or fp16.")]
ScaleOption = Annotated[int | None, typer.Option("--scale-bits", help="16, or 8 or 6 under a row's super-scale.")]
ZeroOption = Annotated[int | None, typer.Option("--zero-bits", help="16, or 8 or 6 in equal steps.")]
CountsOption = Annotated[
    Path | None,
    typer.Option("--counts", help="Routing counts from `milo profile`, for the frequency policy."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BEST_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices", "--device", help="cpu, cuda (all visible GPUs), or cuda:0,cuda:1; GPUs if there are any."
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="CPU threads, one item each; by default the cores, up to 8.")
]
NoPredictOption = Annotated[bool, typer.Option("--no-predict", help="Do not try two seconds of it to tell the time.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]


@dataclass(frozen=True)
class Knobs:
    """The recipe options of `plan` and `quantize`."""

    recipe: str
    ranks: str | None
    bits: int | None
    group_size: int | None
    grid: str | None
    rounds: int | None
    factor: str | None
    scale_bits: int | None
    zero_bits: int | None

    def for_model(self, config: dict[str, Any]) -> Recipe:
        """The recipe for a model with this `config.json`."""
        turned = {key: value for key, value in vars(self).items() if key != "recipe"}
        return custom_recipe(self.recipe, config, **turned)


def read_counts(path: Path | None) -> dict[str, list[float]] | None:
    """Routing counts from a file of `milo profile`.

    Raises:
        PlanError: unreadable or not such a file.
    """
    if path is None:
        return None
    try:
        counts = json.loads(path.read_text())["counts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path} is no file of `milo profile`: {error!r}") from error
    return counts
