"""Plans for a number of bytes: what shares, what pays, what is refused."""

from __future__ import annotations

import pytest

from milo.checkpoint.inventory import Group, Kind
from milo.checkpoint.roles import Role
from milo.errors import PlanError
from milo.format.matrix import Encoding
from milo.plan.budget import Budget, plan_for_bytes
from milo.plan.menu import MENU, Measured, option, units
from milo.plan.plan import Plan
from milo.plan.sensitivity import Sensitivities, role_weight, structural

NOISE = {3: 0.027, 4: 0.0068, 6: 0.0004, 8: 0.00003}
COARSER = {32: 0.75, 64: 1.0, 128: 1.25}


def single(name: str, shape: tuple[int, int] = (512, 512), role: Role = Role.ATTENTION) -> Group:
    return Group(name, role, Kind.SINGLE, (name + ".weight",), 1, shape, "BF16")


def experts(name: str, count: int = 8, shape: tuple[int, int] = (256, 512)) -> Group:
    members = tuple(name.replace("*", str(i)) + ".weight" for i in range(count))
    return Group(name, Role.EXPERT, Kind.EXPERTS, members, count, shape, "BF16")


LAYER = [
    single("model.layers.0.self_attn.q_proj"),
    single("model.layers.0.self_attn.v_proj"),
    experts("model.layers.0.mlp.experts.*.gate_proj"),
    experts("model.layers.0.mlp.experts.*.up_proj"),
    experts("model.layers.0.mlp.experts.*.down_proj", shape=(512, 256)),
]


def white(group: Group, norm: float = 100.0) -> Measured:
    """A group whose errors are those of Gaussian weights; smaller groups are better."""
    share = norm / group.count
    errors = {e: [{0: share * NOISE[e.bits] * COARSER[e.group_size]} for _ in range(group.count)] for e in MENU}
    return Measured(norm, errors)


def weights(groups: list[Group]) -> int:
    return sum(group.parameters for group in groups)


def plan(
    rate: float, sensitivities: dict[str, float] | None = None, measured: dict[str, Measured] | None = None
) -> Plan:
    measured = measured or {g.name: white(g) for g in LAYER}
    known = Sensitivities(sensitivities) if sensitivities else structural(LAYER)
    return plan_for_bytes(LAYER, measured, known, int(rate * weights(LAYER) / 8), "test").plan


@pytest.mark.parametrize("rate", [3.25, 3.4, 3.7, 4.5, 6.5])
def test_the_budget_is_kept_to_the_byte_and_nearly_spent(rate: float) -> None:
    made = plan(rate)
    assert made.nbytes <= rate * weights(LAYER) / 8
    assert made.bits_per_weight > rate - 0.15
    assert [row.name for row in made.rows] == [group.name for group in LAYER]


@pytest.mark.parametrize("rate", [3.3, 3.5, 4.0, 5.0])
def test_gate_and_up_of_a_layer_share_bits_and_group(rate: float) -> None:
    made = plan(rate, {g.name: 10.0 if "gate" in g.name else 0.1 for g in LAYER})
    assert made.by_name[LAYER[2].name].encoding == made.by_name[LAYER[3].name].encoding
    names = [[group.name.rpartition(".")[2] for group in unit] for unit in units(LAYER)]
    assert names == [["q_proj"], ["v_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_the_sensitive_matrix_gets_the_bits() -> None:
    sharp = plan(3.6, {g.name: 5.0 if "v_proj" in g.name else 0.5 for g in LAYER})
    assert sharp.by_name[LAYER[1].name].encoding.bits > sharp.by_name[LAYER[0].name].encoding.bits
    assert sharp.by_name[LAYER[1].name].encoding.bits > sharp.by_name[LAYER[4].name].encoding.bits


def test_a_plan_survives_its_json() -> None:
    made = plan(3.6)
    assert Plan.from_json(made.to_json()).digest == made.digest


def test_rank_goes_to_the_expert_in_which_it_pays_and_to_no_other() -> None:
    measured = {g.name: white(g) for g in LAYER}
    down = measured[LAYER[4].name]
    for encoding, members in down.errors.items():
        if encoding.bits <= 4:
            members[3][8] = members[3][0] * 0.05  # one expert is nearly of rank 8
            members[5][8] = members[5][0] * 0.97  # another gains less than its bytes
    made = plan(3.32, measured=measured)
    assert made.by_name[LAYER[4].name].ranks == (0, 0, 0, 8, 0, 0, 0, 0)
    assert sum(sum(row.ranks) for row in made.rows) == 8


def test_bytes_of_an_option_are_the_rows() -> None:
    group = LAYER[4]
    chosen = option(group, white(group), 1.0, MENU[1])
    assert chosen.nbytes == 8 * MENU[1].nbytes((512, 256), 0)
    stack = Group("model.layers.0.mlp.experts.down_proj", Role.EXPERT, Kind.STACK, ("x",), 8, (512, 256), "BF16")
    assert option(stack, white(stack), 1.0, MENU[1]).nbytes == MENU[1].nbytes((8, 512, 256), 0)


def test_a_group_of_zeros_costs_nothing_and_takes_the_least() -> None:
    measured = {g.name: white(g) for g in LAYER}
    measured[LAYER[0].name] = white(LAYER[0], norm=0.0)
    assert plan(3.4, measured=measured).by_name[LAYER[0].name].encoding == MENU[0]


@pytest.mark.parametrize(
    ("text", "rate", "folder"),
    [("3.4bpw", 3.4, None), (" 4 BPW", 4.0, None), ("20GiB", None, 20 * 2**30), ("1.5GB", None, 1_500_000_000)],
)
def test_budgets_are_read(text: str, rate: float | None, folder: int | None) -> None:
    budget = Budget.parse(text)
    assert (budget.rate, budget.folder) == (rate, folder)


@pytest.mark.parametrize("text", ["3.4", "bpw", "0bpw", "-3bpw", "20 parsecs", "", "1e3MB", "0GiB"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is no budget"):
        Budget.parse(text)


def test_too_small_a_folder_says_what_is_kept() -> None:
    with pytest.raises(PlanError, match="takes 2,000,000 bytes"):
        Budget.parse("1MB").matrix_bytes(1000, 2_000_000)
    with pytest.raises(PlanError, match="too small"):
        plan(3.0)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("model.layers.0.block_sparse_moe.experts.*.w2", "model.layers.9.mlp.experts.*.down_proj"),
        ("model.layers.0.mlp.experts.gate_up_proj", "x.w13"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "model.layers.0.self_attn.kv_b_proj"),
    ],
)
def test_roles_go_by_the_last_part_of_the_name(name: str, like: str) -> None:
    assert role_weight(name) == role_weight(like)


def test_what_feeds_two_things_weighs_as_much_as_both() -> None:
    assert role_weight("a.gate_up_proj") == role_weight("a.gate_proj") + role_weight("a.up_proj")
    assert role_weight("a.kv_a_proj_with_mqa") == role_weight("a.k_proj") + role_weight("a.v_proj")
    assert role_weight("a.something_new") == role_weight("a.o_proj")


def test_the_menu_is_what_the_kernels_know() -> None:
    assert {e.bits for e in MENU} == {3, 4, 6, 8}
    assert all(e.zero_bits == (6 if e.bits <= 4 else 8) and e.scale_bits == 6 for e in MENU)
    assert MENU[0] == Encoding(3, 128, 6, 6)
