"""Roles: what a weight matrix does in the model, from where it stands.

The paper's "dense layers" are `attention`, `shared_expert` and `dense_ffn`, its "sparse layers" are `expert`; these
four are compressed. Everything else stays in the source dtype: routers (small, and a wrong expert costs more than
any bit saves), embeddings, heads, norms, and whatever is not understood (convolutions, state-space mixers, vision
and audio towers), which is `other`.

Names decide between roles, never between architectures: the words below are those that model authors share. Where
transformers knows the class, `Placement.kind` decides first whether a tensor is a linear layer at all.
"""

from __future__ import annotations

import re
from enum import StrEnum

MIN_FEATURES = 32  # a narrower matrix is a gate of some kind, and no kernel would gain from it


class Role(StrEnum):
    """Role of a weight in the model."""

    ATTENTION = "attention"
    SHARED_EXPERT = "shared_expert"
    DENSE_FFN = "dense_ffn"
    EXPERT = "expert"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    OTHER = "other"

    @property
    def compressed(self) -> bool:
        return self in (Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_FFN, Role.EXPERT)

    @property
    def dense(self) -> bool:
        """The paper's "dense layers"."""
        return self.compressed and self is not Role.EXPERT


# `experts.3.w1` and `experts.expert_3.wi`: the expert's number is the next part of the name.
EXPERT_INDEX = re.compile(r"(?<=\.experts\.)(expert_)?(\d+)(?=\.)")
LAYER_INDEX = re.compile(r"(?<=\.)(\d+)(?=\.)")

_OTHER_TOWER = re.compile(
    r"vision|visual|audio|image|video|codec|code2wav|code_predictor|projector|perception|resampler|merger|"
    r"timestamp|hyper_connection|indexer|conv|mamba|mtp|^vit|^sam"
)
_SHARED = re.compile(r"^(shared?_experts?|shared_mlp)$")
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate|moe_statics)$")
_ATTENTION = re.compile(r"attn|attention")
_FFN = re.compile(r"^(mlps?|ffn|feed_forward|block_sparse_moe|dense_mlp)$")
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^shared$")
_HEAD = re.compile(r"^(lm_head|head|output|unembed|embed_out|score)$")
_NORM = re.compile(r"norm|^ln_")
_ATTENTION_LEAF = re.compile(r"^([qkvo]|qkv|q_a|q_b|kv_a|kv_b)_proj(_with_mqa)?$")
_FFN_LEAF = re.compile(r"^(gate|up|down|gate_up)_proj$")


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """Role of a weight tensor, by its name and shape alone.

    Args:
        name: checkpoint name, e.g. `model.layers.0.mlp.experts.7.up_proj.weight`.
        shape: its shape; three dimensions mean a stack of experts.
    """
    parts = name.removesuffix(".weight").lower().split(".")
    if EXPERT_INDEX.search(name):
        role = Role.EXPERT
    elif len(shape) == 3 and any("expert" in part or part in ("moe", "block_sparse_moe") for part in parts):
        role = Role.SHARED_EXPERT if any(_SHARED.match(part) for part in parts) else Role.EXPERT
    else:
        role = _by_words(parts)
    if role.compressed and (len(shape) < 2 or min(shape[-2:]) < MIN_FEATURES):
        return Role.OTHER
    return role


def _by_words(parts: list[str]) -> Role:
    if _NORM.search(parts[-1]):
        return Role.NORM
    if any(_OTHER_TOWER.search(part) for part in parts):
        return Role.OTHER
    for pattern, role in ((_ROUTER, Role.ROUTER), (_SHARED, Role.SHARED_EXPERT)):
        if any(pattern.match(part) for part in parts):
            return role
    if _EMBEDDING.search(parts[-1]):
        return Role.EMBEDDING
    if _HEAD.match(parts[-1]):
        return Role.HEAD
    if any(_ATTENTION.search(part) for part in parts[:-1]) or _ATTENTION_LEAF.match(parts[-1]):
        return Role.ATTENTION
    if any(_FFN.match(part) for part in parts[:-1]) or _FFN_LEAF.match(parts[-1]):
        return Role.DENSE_FFN
    return Role.OTHER
