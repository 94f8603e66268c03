"""Recipes: the few knobs from which a plan is made, and the paper's presets.

`milo-s1` and `milo-s2` follow Table 4 of the paper where it speaks: Mixtral-8x7B (its experts by the official
code's power-of-two kurtosis rule) and DeepSeek-MoE-16B. Any other model gets the same proportions of its hidden
size: dense layers h/8 and h/4, experts h/256 and h/128 on average, distributed by kurtosis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from milo.errors import PlanError
from milo.format.matrix import Encoding

GRIDS = ("rtn", "hqq", "mse")


@dataclass(frozen=True)
class Recipe:
    """Everything a user chooses.

    Attributes:
        name: for reports.
        ranks: rank policy, e.g. `dense:512+kurtosis:16` (see `milo.plan.ranks`).
        grid: `rtn`, `hqq` or `mse`.
        rounds: solves of the alternation at most. The official code's `iter = n` is `n + 1` rounds.
        encoding: bits, group size, metadata and factor widths.

    Raises:
        PlanError: unknown grid or fewer than one round.
    """

    name: str
    ranks: str = "none"
    grid: str = "hqq"
    rounds: int = 20
    encoding: Encoding = field(default_factory=Encoding)

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise PlanError(f"unknown grid {self.grid!r}; choose one of {', '.join(GRIDS)}")
        if self.rounds < 1:
            raise PlanError(f"rounds = {self.rounds}, but at least one solve is needed")

    def with_encoding(self, **fields: Any) -> Recipe:
        """A copy with some fields of the encoding replaced (None keeps a field)."""
        changed = {key: value for key, value in fields.items() if value is not None}
        return replace(self, encoding=replace(self.encoding, **changed)) if changed else self


PRESETS = ("rtn", "hqq", "milo-s1", "milo-s2")
DEFAULT = "milo-s1"

# Table 4 of the paper: (model_type, hidden size) of the two models it speaks of.
_PAPER: Mapping[tuple[str, int], Mapping[str, str]] = {
    ("mixtral", 4096): {"milo-s1": "dense:512+kurtosis2:16", "milo-s2": "dense:1024+kurtosis2:32"},
    ("deepseek", 2048): {"milo-s1": "dense:800", "milo-s2": "dense:1024+frequency:32"},
}
_PROPORTIONS = {"milo-s1": "dense:h/8+kurtosis:h/256", "milo-s2": "dense:h/4+kurtosis:h/128"}


def preset(name: str, config: Mapping[str, Any]) -> Recipe:
    """The named recipe for a model.

    Args:
        name: one of `PRESETS`.
        config: the model's parsed `config.json`.

    Raises:
        PlanError: unknown name.
    """
    if name == "rtn":
        return Recipe("rtn", grid="rtn")
    if name == "hqq":
        return Recipe("hqq")
    if name not in _PROPORTIONS:
        raise PlanError(f"unknown recipe {name!r}; choose one of {', '.join(PRESETS)}")
    paper = _PAPER.get((str(config.get("model_type")), hidden_size(config)))
    return Recipe(name, ranks=paper[name] if paper else _PROPORTIONS[name])


def custom_recipe(
    name: str,
    config: Mapping[str, Any],
    *,
    ranks: str | None = None,
    grid: str | None = None,
    rounds: int | None = None,
    **encoding: Any,
) -> Recipe:
    """A preset with some of its knobs turned; None leaves a knob alone.

    Args:
        name: the preset.
        config: the model's parsed `config.json`.
        ranks: rank policy.
        grid: `rtn`, `hqq` or `mse`.
        rounds: solves at most.
        encoding: fields of `Encoding`.

    Raises:
        PlanError: a value that does not exist.
    """
    turned: dict[str, Any] = {"ranks": ranks, "grid": grid, "rounds": rounds}
    recipe = replace(preset(name, config), **{k: v for k, v in turned.items() if v is not None})
    return recipe.with_encoding(**encoding)


def hidden_size(config: Mapping[str, Any]) -> int:
    """Width of the residual stream, from the config or its text part; 0 if it names none."""
    for part in (config, config.get("text_config"), config.get("llm_config"), config.get("thinker_config")):
        if isinstance(part, Mapping):
            for key in ("hidden_size", "d_model", "n_embd", "dim"):
                if isinstance(part.get(key), int):
                    return int(part[key])
            nested = part.get("text_config")
            if part is not config and isinstance(nested, Mapping):
                return hidden_size(nested)
    return 0
