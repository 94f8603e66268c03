"""The plan: exact bytes by hand, a JSON form that loses nothing and stays small, a digest that notices everything."""

from __future__ import annotations

import copy
import json
import time
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import builders
from milo.checkpoint.inventory import Group, Kind, take_inventory
from milo.checkpoint.roles import Role
from milo.errors import FormatError, MiloError, PlanError
from milo.format.matrix import BITS, FACTOR_BITS, GROUP_SIZES, META_BITS, Encoding
from milo.plan.plan import Plan, Row, make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import custom_recipe, preset

ROW = Row("model.layers.1.mlp.experts.*.up_proj", Role.EXPERT, Kind.EXPERTS, (96, 64), (3, 0, 17, 3), Encoding(), "hqq")
PLAN = Plan((ROW,), "milo-s1", "kurtosis:6", 20, 1)

encodings = st.builds(
    Encoding,
    st.sampled_from(BITS),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(META_BITS),
    st.sampled_from(META_BITS),
    st.sampled_from(list(FACTOR_BITS)),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan: matrices outside layers, holes in the layers, layers in any order, ranks in any pattern."""
    layers = draw(st.lists(st.integers(0, 120), min_size=1, max_size=6, unique=True))
    leaves = [(Kind.SINGLE, "self_attn.q_proj"), (Kind.STACK, "experts.down_proj"), (Kind.EXPERTS, "experts.*.w1")]
    choice = draw(st.lists(encodings, min_size=1, max_size=2))
    rows = []
    for kind, leaf in draw(st.lists(st.sampled_from(leaves), min_size=1, max_size=3, unique=True)):
        count = 1 if kind is Kind.SINGLE else draw(st.integers(1, 5))
        role = Role.ATTENTION if kind is Kind.SINGLE else Role.EXPERT
        swapped = kind is Kind.STACK and draw(st.booleans())
        names = [f"model.layers.{i}.{leaf}" for i in layers] + draw(st.sampled_from([[], [f"proj.{leaf}"]]))
        for name in names:
            ranks = tuple(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
            shape = draw(st.sampled_from([(64, 96), (33, 40)]))
            grid = draw(st.sampled_from(["rtn", "hqq", "mse"]))
            rows.append(Row(name, role, kind, shape, ranks, draw(st.sampled_from(choice)), grid, swapped))
    return Plan(tuple(draw(st.permutations(rows))), "custom", "sparse:3", draw(st.integers(1, 40)), 0)


@given(plans())
def test_json_keeps_every_row_and_the_digest(plan: Plan) -> None:
    back = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back.by_name == plan.by_name
    assert replace(back, rows=()) == replace(plan, rows=())
    assert back.digest == plan.digest
    assert back.nbytes == plan.nbytes
    assert dict(back.tensors()) == dict(plan.tensors())


def test_json_merges_layers_and_runs_of_ranks() -> None:
    rows = [
        replace(ROW, name=f"model.layers.{i}.mlp.experts.*.up_proj", ranks=(8, 8, 8, 0) if i != 4 else (0,) * 4)
        for i in (1, 2, 3, 4, 7)
    ]
    data = Plan(tuple(rows), "custom", "p", 20).to_json()
    assert [(entry["name"], entry["layers"], entry["count"], entry["ranks"]) for entry in data["matrices"]] == [
        ("model.layers.{}.mlp.experts.*.up_proj", "1-4 7", 4, "8x3 0 8x3 0 8x3 0x5 8x3 0")
    ]


def changed(value: Any) -> list[Plan]:
    return [replace(PLAN, rows=(replace(ROW, **{field: v}),)) for field, v in value.items()]


VARIANTS = [
    replace(PLAN, recipe="milo-s2"),
    replace(PLAN, policy="kurtosis:7"),
    replace(PLAN, rounds=21),
    replace(PLAN, clipped=0),
    replace(PLAN, rows=(ROW, replace(ROW, name="model.layers.2.mlp.experts.*.up_proj"))),
    *changed(
        {
            "name": "model.layers.2.mlp.experts.*.up_proj",
            "role": Role.SHARED_EXPERT,
            "kind": Kind.STACK,
            "shape": (64, 96),
            "ranks": (3, 0, 17, 4),
            "grid": "rtn",
            "transposed": True,
        }
    ),
    *changed({"ranks": (0, 3, 17, 3)}),
    *(
        changed({"encoding": Encoding(**{field: value})})[0]
        for field, value in {"bits": 4, "group_size": 32, "scale_bits": 8, "zero_bits": 6, "factor": "int8"}.items()
    ),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_digest_changes_when_anything_changes(variant: Plan) -> None:
    assert variant.digest != PLAN.digest
    assert len(PLAN.digest) == 64
    assert Plan.from_json(PLAN.to_json()).digest == PLAN.digest


def damage(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(PLAN.to_json())
    target: Any = data
    *parents, leaf = path.split(".")
    for key in parents:
        target = target[int(key)] if key.isdigit() else target[key]
    if value is None:
        del target[leaf]
    else:
        target[leaf] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("matrices", None),
        ("rounds", None),
        ("rounds", "many"),
        ("matrices.0.ranks", None),
        ("matrices.0.ranks", "3 0 17"),  # too few
        ("matrices.0.ranks", "3 0 65 3"),  # above min(N, K)
        ("matrices.0.ranks", "3 0 -1 3"),
        ("matrices.0.ranks", "3 0 17x 3"),
        ("matrices.0.ranks", ""),
        ("matrices.0.ranks", 3),
        ("matrices.0.layers", "1-"),
        ("matrices.0.layers", "1 2"),  # ranks for one layer only
        ("matrices.0.layers", "2-1"),
        ("matrices.0.shape", [96]),
        ("matrices.0.shape", [0, 64]),
        ("matrices.0.count", 0),
        ("matrices.0.count", 3),
        ("matrices.0.role", "mascot"),
        ("matrices.0.kind", "pile"),
        ("matrices.0.grid", "awq"),
        ("matrices.0.bits", None),
        ("matrices.0.bits", 7),
        ("matrices.0.bits", "3"),
        ("matrices.0.factor", "int4"),
        ("matrices.0", "text"),
        ("matrices", "text"),
    ],
)
def test_a_damaged_plan_is_refused(path: str, value: Any) -> None:
    data = damage(path, value) if path != "matrices.0" else {**PLAN.to_json(), "matrices": [value]}
    with pytest.raises((FormatError, PlanError)) as caught:
        Plan.from_json(data)
    assert isinstance(caught.value, MiloError)
    assert str(caught.value)


def test_a_matrix_named_twice_is_refused() -> None:
    data = PLAN.to_json()
    data["matrices"] *= 2
    with pytest.raises(FormatError, match="names a matrix twice"):
        Plan.from_json(data)


def test_rows_name_their_matrices_and_tensors() -> None:
    assert ROW.matrices() == [f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(4)]
    names = ROW.tensors()
    assert "model.layers.1.mlp.experts.2.up_proj.lowrank_u" in names
    assert "model.layers.1.mlp.experts.1.up_proj.lowrank_u" not in names  # rank 0
    stack = replace(ROW, name="model.layers.1.mlp.experts.up_proj", kind=Kind.STACK)
    assert stack.matrices() == ["model.layers.1.mlp.experts.up_proj"]
    assert stack.tensors()["model.layers.1.mlp.experts.up_proj.lowrank_v"].shape == (23, 6)
    assert stack.parameters == ROW.parameters == 4 * 96 * 64


def test_bytes_and_bits_of_a_plan_are_sums_over_its_tensors() -> None:
    assert PLAN.nbytes == sum(spec.nbytes for _, spec in PLAN.tensors())
    assert PLAN.bits_per_weight == 8 * PLAN.nbytes / (4 * 96 * 64) == ROW.bits_per_weight


def real_plan(shapes: builders.Shapes, config: dict[str, Any], recipe: str, evidence: Evidence, **knobs: Any) -> Plan:
    inventory = take_inventory(builders.heads(shapes), config)
    return make_plan(inventory, custom_recipe(recipe, config, **knobs), config, evidence)


@pytest.mark.parametrize(("recipe", "dense", "expert"), [("milo-s1", 512, 16), ("milo-s2", 1024, 32)])
def test_mixtral_8x7b_by_hand(recipe: str, dense: int, expert: int) -> None:
    """Every expert at κ = 2, where the official rule gives 16 and 32: 3.5 bits a weight, 3.25 a factor element."""
    shapes, config = builders.mixtral(**builders.MIXTRAL_8X7B)
    plan = real_plan(shapes, config, recipe, Evidence(lambda g: [2.0] * g.count))
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 8 * 3 * 4096 * 14336)
    assert plan.parameters == weights == 46_439_333_888
    assert {r for row in plan.rows if row.role is Role.ATTENTION for r in row.ranks} == {dense}
    assert {r for row in plan.rows if row.role is Role.EXPERT for r in row.ranks} == {expert}
    factors = 32 * (2 * dense * 8192 + 2 * dense * 5120 + 24 * expert * (4096 + 14336))
    assert plan.nbytes * 8 == weights * 3.5 + factors * (3 + 16 / 64)
    assert plan.clipped == 0
    assert len(plan.rows) == 32 * (4 + 3)


def test_mixtral_8x7b_without_compensators_is_19_4_gib() -> None:
    shapes, config = builders.mixtral(**builders.MIXTRAL_8X7B)
    for recipe in ("rtn", "hqq"):
        plan = real_plan(shapes, config, recipe, Evidence(lambda g: []))
        assert plan.bits_per_weight == 3.5
        assert plan.nbytes == 46_439_333_888 * 3.5 / 8
        assert {row.grid for row in plan.rows} == {recipe}


def test_deepseek_moe_16b_by_hand() -> None:
    shapes, config = builders.deepseek_v1(**builders.DEEPSEEK_16B)
    plan = real_plan(shapes, config, "milo-s1", Evidence(lambda g: []))
    # Attention; layer 0's FFN; shared experts (2 × 1408 wide); 64 experts of 27 layers.
    per_kind = [
        (28 * 4, 2048, 2048, 800),
        (3, 2048, 10944, 800),
        (27 * 3, 2048, 2816, 800),
        (27 * 64 * 3, 2048, 1408, 0),
    ]
    assert plan.parameters == sum(c * a * b for c, a, b, _ in per_kind) == 15_952_642_048
    factors = sum(c * r * (a + b) for c, a, b, r in per_kind)
    # 10944 is no multiple of 128 but of 64 and 32: not a bit of padding anywhere.
    assert plan.nbytes * 8 == plan.parameters * 3.5 + factors * (3 + 16 / 64)
    roles = {role: {r for row in plan.rows if row.role is role for r in row.ranks} for role in Role if role.compressed}
    assert roles == {
        Role.ATTENTION: {800},
        Role.DENSE_FFN: {800},
        Role.SHARED_EXPERT: {800},
        Role.EXPERT: {0},
    }


def test_deepseek_moe_16b_s2_needs_counts_and_follows_them() -> None:
    shapes, config = builders.deepseek_v1(**builders.DEEPSEEK_16B)
    with pytest.raises(PlanError, match="milo profile"):
        real_plan(shapes, config, "milo-s2", Evidence(lambda g: []))
    counts = {f"model.layers.{i}.mlp.experts": [1] * 63 + [65] for i in range(1, 28)}
    plan = real_plan(shapes, config, "milo-s2", Evidence(lambda g: [], counts))
    experts = [row for row in plan.rows if row.role is Role.EXPERT]
    assert all(row.ranks == (16,) * 63 + (1040,) for row in experts)
    assert {r for row in plan.rows if row.role.dense for r in row.ranks} == {1024}


def deepseek_v3() -> tuple[builders.Shapes, dict[str, Any]]:
    """Names and shapes of DeepSeek-V3's 61 layers (the first three dense), without its MTP module."""
    hidden, experts = 7168, 256
    shapes: builders.Shapes = {"model.embed_tokens.weight": (129280, hidden), "lm_head.weight": (129280, hidden)}
    for i in range(61):
        p = f"model.layers.{i}"
        shapes |= {
            f"{p}.self_attn.q_a_proj.weight": (1536, hidden),
            f"{p}.self_attn.q_b_proj.weight": (24576, 1536),
            f"{p}.self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
            f"{p}.self_attn.kv_b_proj.weight": (32768, 512),
            f"{p}.self_attn.o_proj.weight": (hidden, 16384),
        }
        blocks = {f"{p}.mlp": 18432}
        if i >= 3:
            shapes[f"{p}.mlp.gate.weight"] = (experts, hidden)
            blocks = {f"{p}.mlp.experts.{e}": 2048 for e in range(experts)} | {f"{p}.mlp.shared_experts": 2048}
        for block, width in blocks.items():
            shapes |= {f"{block}.gate_proj.weight": (width, hidden), f"{block}.up_proj.weight": (width, hidden)}
            shapes[f"{block}.down_proj.weight"] = (hidden, width)
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": hidden}
    return shapes, config


def test_a_plan_of_45_000_matrices_is_made_in_seconds_and_stays_small() -> None:
    shapes, config = deepseek_v3()
    begin = time.perf_counter()
    plan = real_plan(shapes, config, "milo-s1", Evidence(lambda g: []), ranks="dense:896+sparse:28")
    text = json.dumps(plan.to_json())
    assert plan.bits_per_weight > 3.5
    assert plan.digest == Plan.from_json(json.loads(text)).digest
    seconds = time.perf_counter() - begin
    assert sum(len(row.ranks) for row in plan.rows) == 58 * 256 * 3 + 61 * 5 + 3 * 3 + 58 * 3
    assert len(text) < 64 * 1024
    assert len(text) < 8 * 1024  # uniform ranks within a role: one entry a projection
    assert seconds < 5


def test_a_plan_of_45_000_different_ranks_still_fits_a_config() -> None:
    shapes, config = deepseek_v3()

    def kurtosis(group: Group) -> list[float]:
        return [zlib.crc32(f"{group.name}{i}".encode()) % 1000 / 100 for i in range(group.count)]

    plan = real_plan(shapes, config, "milo-s1", Evidence(kurtosis))
    text = json.dumps(plan.to_json())
    assert len({r for row in plan.rows for r in row.ranks}) > 50
    assert len(text) < 256 * 1024
    assert Plan.from_json(json.loads(text)).by_name == plan.by_name
    ranks = [r for row in plan.rows if row.role is Role.EXPERT for r in row.ranks]
    assert sum(ranks) == 28 * len(ranks)


def test_the_plan_says_how_many_matrices_were_clipped() -> None:
    shapes, config = builders.mixtral()
    plan = real_plan(shapes, config, "hqq", Evidence(lambda g: []), ranks="dense:50")
    assert plan.clipped == 4  # k and v of two layers, 32 wide
    assert plan.by_name["model.layers.0.self_attn.k_proj"].ranks == (32,)
    assert plan.by_name["model.layers.0.self_attn.q_proj"].ranks == (50,)
    assert Plan.from_json(plan.to_json()).clipped == 4


def test_the_row_carries_out_the_recipe() -> None:
    shapes, config = builders.mixtral()
    recipe = custom_recipe("rtn", config, bits=4, group_size=32, factor="fp16", ranks="sparse:2", rounds=7)
    plan = make_plan(take_inventory(builders.heads(shapes), config), recipe, config, Evidence(lambda g: []))
    assert (plan.recipe, plan.policy, plan.rounds) == ("rtn", "sparse:2", 7)
    assert {row.encoding for row in plan.rows} == {Encoding(4, 32, factor="fp16")}
    assert {row.grid for row in plan.rows} == {"rtn"}
    assert preset("rtn", config).encoding == Encoding()
