"""Rank policies of the paper: who gets rank, how much, what is clipped, and what is refused with a remedy.

The two published mean ranks (22.0 and 33.4 on Mixtral-8x7B for `kurtosis2`) are reproduced from the histogram of
rounded kurtosis values that the official code ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import builders
from milo.checkpoint.inventory import Group, Kind, take_inventory
from milo.checkpoint.roles import Role
from milo.errors import PlanError
from milo.plan.ranks import POLICIES, Evidence, assign_ranks, parse_policy, proportional

# Rounded kurtosis of the 768 expert matrices of Mixtral-8x7B: value → matrices (w1 and w3 are 0 but for 49 ones).
MIXTRAL_KURTOSIS = {0: 8 + 512 - 49, 1: 133 + 49, 2: 64, 3: 35, 4: 4, 6: 1, 7: 1, 9: 2, 11: 8}


def no_weights(group: Group) -> Sequence[float]:
    raise AssertionError(f"the policy read the weights of {group.name}")


BLIND = Evidence(no_weights)


def groups_of(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> list[Group]:
    return take_inventory(builders.heads(shapes), config).groups


@pytest.fixture
def deepseek() -> list[Group]:
    """Attention, one dense FFN, shared experts and two layers of six experts; hidden size 64."""
    return groups_of(*builders.deepseek_v1())


def by_role(groups: Sequence[Group], ranks: Mapping[str, Sequence[int]]) -> dict[Role, set[int]]:
    found: dict[Role, set[int]] = {}
    for group in groups:
        found.setdefault(group.role, set()).update(ranks[group.name])
    return found


@pytest.mark.parametrize(
    ("policy", "dense", "expert"),
    [
        ("none", 0, 0),
        ("uniform:5", 5, 5),
        ("dense:5", 5, 0),
        ("sparse:5", 0, 5),
        ("dense:5+sparse:3", 5, 3),
        ("uniform:2 + dense:5 + sparse:1", 7, 3),
        ("dense:h/8+sparse:h/16", 8, 4),
        ("dense:0", 0, 0),
    ],
)
def test_terms_give_their_rank_to_their_roles_and_add_up(
    policy: str, dense: int, expert: int, deepseek: list[Group]
) -> None:
    ranks, clipped = assign_ranks(deepseek, policy, 64, BLIND)
    assert by_role(deepseek, ranks) == {
        Role.ATTENTION: {dense},
        Role.DENSE_FFN: {dense},
        Role.SHARED_EXPERT: {dense},
        Role.EXPERT: {expert},
    }
    assert clipped == 0
    assert all(len(ranks[g.name]) == g.count for g in deepseek)


def test_ranks_beyond_a_matrix_are_clipped_to_its_smaller_side_and_counted(deepseek: list[Group]) -> None:
    ranks, clipped = assign_ranks(deepseek, "uniform:50", 64, BLIND)
    assert all(set(ranks[g.name]) == {min(50, *g.shape)} for g in deepseek)
    assert clipped == 2 * 3 * 6  # the experts, of width 40; everything else has at least 64
    ranks, clipped = assign_ranks(deepseek, "uniform:40+sparse:1", 64, BLIND)
    assert clipped == 36
    assert assign_ranks(deepseek, "uniform:40", 64, BLIND)[1] == 0


def test_frequency_follows_the_counts_of_each_layer(deepseek: list[Group]) -> None:
    counts = {
        "model.layers.1.mlp.experts": [60, 30, 10, 0, 0, 20],
        "model.layers.2.mlp.experts": [1, 1, 1, 1, 1, 1],
    }
    ranks, _ = assign_ranks(deepseek, "frequency:4", 64, Evidence(no_weights, counts))
    for projection in ("gate", "up", "down"):
        assert ranks[f"model.layers.1.mlp.experts.*.{projection}_proj"] == [12, 6, 2, 0, 0, 4]
        assert ranks[f"model.layers.2.mlp.experts.*.{projection}_proj"] == [4] * 6
    assert set(ranks["model.layers.1.self_attn.q_proj"]) == {0}


def test_frequency_without_counts_names_the_command_that_measures_them(deepseek: list[Group]) -> None:
    with pytest.raises(PlanError, match=r"needs routing counts; measure them with `milo profile MODEL --text FILE"):
        assign_ranks(deepseek, "frequency:4", 64, BLIND)


@pytest.mark.parametrize(
    "counts", [{}, {"model.layers.1.mlp.experts": [1, 2, 3]}, {"model.layers.1.mlp.experts": [0] * 6}]
)
def test_counts_of_another_model_are_refused(counts: dict[str, list[float]], deepseek: list[Group]) -> None:
    with pytest.raises(PlanError, match=r"no 6 counts for model\.layers\.1\.mlp\.experts; .*run `milo profile`"):
        assign_ranks(deepseek, "frequency:4", 64, Evidence(no_weights, counts))


def test_kurtosis_reads_experts_only_keeps_the_mean_and_favours_heavy_tails(deepseek: list[Group]) -> None:
    read: list[str] = []

    def kurtosis(group: Group) -> list[float]:
        read.append(group.name)
        return [len(read) + 0.1 * i for i in range(group.count)]

    ranks, clipped = assign_ranks(deepseek, "kurtosis:6", 64, Evidence(kurtosis))
    experts = [g for g in deepseek if g.role is Role.EXPERT]
    assert read == [g.name for g in experts]
    flat = [r for g in experts for r in ranks[g.name]]
    assert sum(flat) == 6 * len(flat)
    assert clipped == 0
    assert flat == sorted(flat)  # kurtosis rises with position here
    assert flat[0] == 0  # κ_min gets nothing
    # In proportion: with κ − κ_min doubled, twice the rank (to a unit of rounding).
    kappa = [1 + g + 0.1 * i - 1 for g in range(len(experts)) for i in range(6)]
    expected = np.array(kappa) * 6 * len(flat) / sum(kappa)
    assert np.abs(np.array(flat) - expected).max() <= 1


def test_equal_kurtosis_shares_evenly(deepseek: list[Group]) -> None:
    ranks, _ = assign_ranks(deepseek, "kurtosis:6", 64, Evidence(lambda g: [2.5] * g.count))
    assert all(set(ranks[g.name]) == {6} for g in deepseek if g.role is Role.EXPERT)


def test_kurtosis_zero_reads_nothing(deepseek: list[Group]) -> None:
    ranks, _ = assign_ranks(deepseek, "dense:2+kurtosis:0", 64, BLIND)
    assert by_role(deepseek, ranks)[Role.EXPERT] == {0}


@pytest.mark.parametrize(
    ("r", "kappa", "rank"),
    [
        (16, 0.5, 0),  # rounds half to even, like Python and the official code
        (16, 0.51, 8),
        (16, -0.53, 0),
        (16, 1.0, 8),
        (16, 1.5, 16),
        (16, 2.5, 16),
        (16, 3.0, 32),
        (16, 9.4, 2048),
        (16, 9.6, 1024),
        (16, 250.0, 1024),
        (32, 0.4, 0),
        (32, 1.0, 16),
        (32, 2.0, 32),
        (32, 9.0, 4096),
        (32, 10.0, 1024),
        (4, 3.0, 8),
    ],
)
def test_kurtosis2_is_the_official_power_of_two_rule(r: int, kappa: float, rank: int) -> None:
    group = Group("m.experts.*.w1", Role.EXPERT, Kind.EXPERTS, ("m.experts.0.w1.weight",), 1, (4096, 14336), "BF16")
    ranks, _ = assign_ranks([group], f"kurtosis2:{r}", 4096, Evidence(lambda g: [kappa]))
    assert ranks == {"m.experts.*.w1": [rank]}


@pytest.mark.parametrize("r", [0, 1, 2, 3, 5, 24])
def test_kurtosis2_of_another_rank_is_refused(r: int, deepseek: list[Group]) -> None:
    with pytest.raises(PlanError, match=f"kurtosis2:{r} is not defined; its r is a power of two from 4 on"):
        assign_ranks(deepseek, f"kurtosis2:{r}", 64, Evidence(lambda g: [1.0] * g.count))


@pytest.mark.parametrize(("r", "total"), [(16, 16_912), (32, 25_632)])
def test_kurtosis2_gives_mixtral_8x7b_the_published_mean_ranks(r: int, total: int) -> None:
    groups = groups_of(*builders.mixtral(**builders.MIXTRAL_8X7B))
    values = iter([float(k) for k, matrices in MIXTRAL_KURTOSIS.items() for _ in range(matrices)])
    ranks, clipped = assign_ranks(groups, f"kurtosis2:{r}", 4096, Evidence(lambda g: [next(values) for _ in range(8)]))
    flat = [rank for g in groups if g.role is Role.EXPERT for rank in ranks[g.name]]
    assert len(flat) == 768
    assert sum(flat) == total
    assert round(total / 768, 1) == {16: 22.0, 32: 33.4}[r]
    assert clipped == 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("gauss:5", r"unknown rank policy 'gauss' in 'gauss:5'; choose from uniform, dense, .* or none"),
        ("dense:5,sparse:3", r"'5,sparse:3' in .* is no rank"),
        ("dense:5+", r"unknown rank policy ''"),
        ("dense", r"'' in 'dense' is no rank; write a number or h/8"),
        ("dense:x", r"'x' in 'dense:x' is no rank"),
        ("dense:h/0", r"'h/0' in 'dense:h/0' is no rank"),
        ("dense:-4", r"'-4' in 'dense:-4' is negative"),
    ],
)
def test_a_bad_policy_is_refused_with_what_is_wrong(policy: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_policy(policy, 64)


def test_fractions_of_the_hidden_size_need_one() -> None:
    assert parse_policy("dense:h/8+kurtosis:h/256+sparse:h", 4096) == [
        ("dense", 512),
        ("kurtosis", 16),
        ("sparse", 4096),
    ]
    with pytest.raises(PlanError, match="needs the model's hidden size, which its config does not name"):
        parse_policy("dense:h/8", 0)


def test_every_policy_is_documented_in_the_table_of_its_module() -> None:
    from milo.plan import ranks

    assert all(f"| `{name}:r` |" in (ranks.__doc__ or "") for name in POLICIES)


@st.composite
def sharing(draw: st.DrawFn) -> tuple[np.ndarray, int, np.ndarray]:
    n = draw(st.integers(1, 12))
    weights = draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n))
    limits = draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
    return np.array(weights, dtype=float), draw(st.integers(0, 500)), np.array(limits)


@given(sharing())
def test_proportional_spends_exactly_the_total_within_every_limit(
    case: tuple[np.ndarray, int, np.ndarray],
) -> None:
    weights, total, limits = case
    ranks = proportional(weights, total, limits)
    assert ranks.sum() == min(total, limits.sum())
    assert (ranks >= 0).all()
    assert (ranks <= limits).all()


@given(sharing(), st.integers(1, 60))
def test_proportional_never_gives_more_to_the_smaller_weight(
    case: tuple[np.ndarray, int, np.ndarray], limit: int
) -> None:
    weights, total, _ = case
    ranks = proportional(weights, total, np.full(len(weights), limit))
    order = np.argsort(weights, kind="stable")
    for a, b in pairwise(order):
        assert ranks[a] <= ranks[b] + (weights[a] == weights[b])


@given(sharing())
def test_proportional_is_proportional_where_no_limit_is_hit(case: tuple[np.ndarray, int, np.ndarray]) -> None:
    weights, total, _ = case
    assume(weights.any())
    ranks = proportional(weights, total, np.full(len(weights), 10_000))
    assert np.abs(ranks - total * weights / weights.sum()).max() < 1


def test_what_a_limit_cuts_off_goes_to_the_others() -> None:
    assert proportional(np.array([90.0, 5.0, 5.0]), 30, np.array([10, 50, 50])).tolist() == [10, 10, 10]
    # Even to those of no weight, once all the others are full.
    assert proportional(np.array([1.0, 0.0, 0.0]), 10, np.array([2, 1, 10])).tolist() == [2, 1, 7]
