"""Sensitivities: how much a relative error in a group of matrices costs the model, in nats of KL divergence a token.

If a group's weights carry an error of relative squared size ρ² that looks like noise, the model's predictions move by
about `s · ρ²` nats. The errors of different groups add up (that is what makes an allocation a knapsack), so the
sensitivities `s` are all that an allocator has to know of the model. Only their ratios matter to it. The grid search
can use one thing more: which in-features of a matrix its errors hurt most (`importance`).

`structural` reads them off the checkpoint's names. Every expert matrix counts for 1/E of its stack, since it sees 1/E
of the tokens; so a whole stack counts like one dense matrix. The weights of the roles were measured on one small
Mixtral (docs/log.md) and rounded. What they cannot know is how much each block contributes to the residual stream;
`milo.integrations.transformers.fisher` measures that where the model can be run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from milo.checkpoint.inventory import Group

# By the last part of a matrix name. A fused matrix errs in all that it feeds, so its parts add up.
_QUERY, _KEY, _VALUE, _OUT = 0.25, 0.4, 1.0, 2 / 3
_GATE, _UP, _DOWN = 2 / 3, 0.4, 1.0
_LEAVES = (
    (re.compile(r"^(down_proj|w2|wo|fc2|c_proj|linear_v\w*|output_linear)$"), _DOWN),
    (re.compile(r"^(gate_up_proj|gate_and_up_proj|w13|input_linear)$"), _GATE + _UP),
    (re.compile(r"^(gate_proj|w1|wi_0)$"), _GATE),
    (re.compile(r"^(up_proj|w3|wi_1|wi|fc1)$"), _UP),
    (re.compile(r"^(qkv|qkv_proj|query_key_value|Wqkv)$"), _QUERY + _KEY + _VALUE),
    # MLA: the latent and its expansion carry keys and values of every head.
    (re.compile(r"^(kv_a_proj\w*|kv_b_proj|kv_proj)$"), _KEY + _VALUE),
    (re.compile(r"^(q|q_proj|q_a_proj|q_b_proj|wq)$"), _QUERY),
    (re.compile(r"^(k|k_proj|wk)$"), _KEY),
    (re.compile(r"^(v|v_proj|wv)$"), _VALUE),
    (re.compile(r"^(o|o_proj|out_proj|dense)$"), _OUT),
)
_UNKNOWN = 2 / 3


@dataclass(frozen=True)
class Sensitivities:
    """What is known of a model's groups, by group name.

    Attributes:
        costs: nats of KL divergence a token at a relative squared error of 1.
        importance: float32 `[E, K]` on the CPU, weights of the in-features' squared errors, 1 on average over each
            matrix; groups that are missing count all in-features alike.
    """

    costs: Mapping[str, float]
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)


def structural(groups: Sequence[Group]) -> Sensitivities:
    """Sensitivities from names alone; the unit is arbitrary, and no in-feature stands out."""
    return Sensitivities({group.name: role_weight(group.name) for group in groups})


def role_weight(name: str) -> float:
    """Weight of the matrix (or stack of experts) called `name`."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return next((weight for pattern, weight in _LEAVES if pattern.match(leaf)), _UNKNOWN)
