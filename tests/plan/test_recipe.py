"""Recipes: the presets are the paper's Table 4 where it speaks, and the same proportions for every other model."""

from __future__ import annotations

from typing import Any

import pytest

from milo.errors import PlanError
from milo.format.matrix import Encoding
from milo.plan.ranks import parse_policy
from milo.plan.recipe import PRESETS, Recipe, custom_recipe, hidden_size, preset

MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096}
DEEPSEEK = {"model_type": "deepseek", "hidden_size": 2048}


@pytest.mark.parametrize(
    ("config", "name", "ranks"),
    [
        (MIXTRAL, "milo-s1", "dense:512+kurtosis2:16"),
        (MIXTRAL, "milo-s2", "dense:1024+kurtosis2:32"),
        (DEEPSEEK, "milo-s1", "dense:800"),
        (DEEPSEEK, "milo-s2", "dense:1024+frequency:32"),
    ],
)
def test_the_papers_models_get_the_papers_ranks(config: dict[str, Any], name: str, ranks: str) -> None:
    assert preset(name, config) == Recipe(name, ranks=ranks, grid="hqq", rounds=20, encoding=Encoding(3, 64))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral", "hidden_size": 6144},  # 8x22B
        {"model_type": "deepseek_v2", "hidden_size": 2048},
        {"model_type": "qwen3_moe", "hidden_size": 4096},
    ],
)
def test_other_models_get_the_same_proportions_of_their_hidden_size(config: dict[str, Any]) -> None:
    h = config["hidden_size"]
    s1, s2 = (parse_policy(preset(name, config).ranks, h) for name in ("milo-s1", "milo-s2"))
    assert s1 == [("dense", h // 8), ("kurtosis", h // 256)]
    assert s2 == [("dense", h // 4), ("kurtosis", h // 128)]
    # Mixtral's own numbers, h = 4096, are where the proportions come from.
    assert [rank for _, rank in parse_policy("dense:h/8+kurtosis:h/256", 4096)] == [512, 16]


def test_rtn_and_hqq_have_no_compensators() -> None:
    assert preset("rtn", MIXTRAL) == Recipe("rtn", ranks="none", grid="rtn")
    assert preset("hqq", MIXTRAL) == Recipe("hqq", ranks="none", grid="hqq")


def test_unknown_names_and_values_are_refused_with_the_choices() -> None:
    with pytest.raises(PlanError, match="unknown recipe 'milo-s3'; choose one of rtn, hqq, milo-s1, milo-s2"):
        preset("milo-s3", MIXTRAL)
    with pytest.raises(PlanError, match="unknown grid 'gptq'; choose one of rtn, hqq"):
        custom_recipe("hqq", MIXTRAL, grid="gptq")
    with pytest.raises(PlanError, match="rounds = 0, but at least one solve is needed"):
        custom_recipe("hqq", MIXTRAL, rounds=0)
    with pytest.raises(PlanError, match="bits = 7 is not supported"):
        custom_recipe("hqq", MIXTRAL, bits=7)


@pytest.mark.parametrize("name", PRESETS)
def test_knobs_change_what_they_name_and_nothing_else(name: str) -> None:
    plain = preset(name, MIXTRAL)
    assert custom_recipe(name, MIXTRAL) == plain
    assert custom_recipe(name, MIXTRAL, ranks=None, bits=None, factor=None) == plain
    turned = custom_recipe(
        name, MIXTRAL, ranks="uniform:8", rounds=3, bits=4, group_size=32, factor="int8", zero_bits=8
    )
    assert turned == Recipe(name, "uniform:8", plain.grid, 3, Encoding(4, 32, 16, 8, "int8"))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"hidden_size": 96}, 96),
        ({"d_model": 96}, 96),
        ({"n_embd": 96}, 96),
        ({"model_type": "llava", "text_config": {"hidden_size": 96}, "vision_config": {"hidden_size": 32}}, 96),
        ({"thinker_config": {"text_config": {"hidden_size": 96}}}, 96),
        ({"hidden_size": None, "text_config": {"hidden_size": 96}}, 96),
        ({}, 0),
        ({"vision_config": {"hidden_size": 32}}, 0),
    ],
)
def test_the_hidden_size_is_found_where_configs_keep_it(config: dict[str, Any], size: int) -> None:
    assert hidden_size(config) == size
