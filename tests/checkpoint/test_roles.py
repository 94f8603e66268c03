"""Roles from names and shapes: the words that model authors share, and the towers that stay as they are."""

from __future__ import annotations

import pytest

from milo.checkpoint.roles import MIN_FEATURES, Role, role_of

SQUARE = (64, 64)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.q_proj.weight", Role.ATTENTION),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", Role.ATTENTION),
        ("model.layers.0.attention.wo.weight", Role.ATTENTION),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", Role.EXPERT),
        ("model.layers.0.mlp.experts.63.up_proj.weight", Role.EXPERT),
        ("decoder.block.1.layer.2.mlp.experts.expert_7.wi.weight", Role.EXPERT),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", Role.SHARED_EXPERT),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", Role.SHARED_EXPERT),
        ("model.layers.0.shared_mlp.gate_proj.weight", Role.SHARED_EXPERT),
        ("model.layers.0.mlp.up_proj.weight", Role.DENSE_FFN),
        ("model.layers.0.feed_forward.w1.weight", Role.DENSE_FFN),
        ("model.layers.0.mlp.gate_proj.weight", Role.DENSE_FFN),
        ("model.layers.0.mlp.gate.weight", Role.ROUTER),
        ("model.layers.0.block_sparse_moe.gate.weight", Role.ROUTER),
        ("model.layers.0.mlp.router.weight", Role.ROUTER),
        ("model.layers.0.mlp.shared_expert_gate.weight", Role.ROUTER),
        ("model.embed_tokens.weight", Role.EMBEDDING),
        ("transformer.wte.weight", Role.EMBEDDING),
        ("shared.weight", Role.EMBEDDING),
        ("lm_head.weight", Role.HEAD),
        ("output.weight", Role.HEAD),
        ("model.norm.weight", Role.NORM),
        ("model.layers.0.input_layernorm.weight", Role.NORM),
        ("transformer.ln_f.weight", Role.NORM),
        ("model.vision_tower.layers.0.self_attn.q_proj.weight", Role.OTHER),
        ("audio_tower.layers.0.mlp.up_proj.weight", Role.OTHER),
        ("multi_modal_projector.up_proj.weight", Role.OTHER),
        ("model.layers.0.mamba.in_proj.weight", Role.OTHER),
        ("model.layers.0.self_attn.indexer.wk.weight", Role.OTHER),
        ("model.layers.0.something.weight", Role.OTHER),
    ],
)
def test_names_decide(name: str, role: Role) -> None:
    assert role_of(name, SQUARE) is role


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", Role.EXPERT),
        ("model.layers.0.block_sparse_moe.input_linear.weight", Role.EXPERT),
        ("model.layers.0.moe.down_proj.weight", Role.EXPERT),
        ("model.layers.0.mlp.shared_experts.down_proj", Role.SHARED_EXPERT),
        ("model.layers.0.conv.weight", Role.OTHER),
    ],
)
def test_three_dimensions_mean_a_stack_of_experts_where_the_name_says_so(name: str, role: Role) -> None:
    assert role_of(name, (4, 64, 96)) is role


@pytest.mark.parametrize("shape", [(MIN_FEATURES - 1, 64), (64, MIN_FEATURES - 1), (4, 64, 16), (64,), ()])
def test_narrow_matrices_and_vectors_are_not_compressed(shape: tuple[int, ...]) -> None:
    assert role_of("model.layers.0.mlp.experts.3.up_proj.weight", shape) is Role.OTHER
    assert role_of("model.layers.0.mlp.experts.3.up_proj.weight", (MIN_FEATURES, MIN_FEATURES)) is Role.EXPERT


def test_the_papers_dense_layers_are_three_roles_and_four_are_compressed() -> None:
    assert {r for r in Role if r.dense} == {Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_FFN}
    assert {r for r in Role if r.compressed} == {r for r in Role if r.dense} | {Role.EXPERT}
