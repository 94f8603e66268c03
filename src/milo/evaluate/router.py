"""Router agreement: whether a token still goes to the experts that the original model sends it to.

A router is left uncompressed, but what it reads has passed through compressed layers, and a choice between two nearly
equal experts tips easily. What follows is not a small error: another expert's output. Perplexity hides it, for the
other expert is often nearly as good. It is seen on the forward passes that the divergence makes anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerAgreement:
    """One experts block.

    Attributes:
        layer: the block's name in the checkpoint, e.g. `model.layers.3.mlp.experts`.
        same_set: share of tokens, from 0 to 1, whose k experts are the original's, in any order.
        overlap: mean share of a token's k experts that the original chooses too; `same_set` for k = 1.
        top_k: experts a token goes to.
        tokens: tokens compared.
    """

    layer: str
    same_set: float
    overlap: float
    top_k: int
    tokens: int


class AgreementTally:
    """Sums agreement over forward passes, by layer."""

    def __init__(self) -> None:
        self._same: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._top_k: dict[str, int] = {}

    def add(self, chosen: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> None:
        """Adds a pass of both models over the same tokens; int64 `[tokens, k]` a layer, on any devices."""
        for layer, experts in chosen.items():
            others = reference[layer].to(experts.device)
            kept = (experts[:, :, None] == others[:, None, :]).any(-1)  # [tokens, k]: the original chose it too
            self._same[layer] = self._same.get(layer, 0) + int(kept.all(-1).sum())
            self._kept[layer] = self._kept.get(layer, 0) + int(kept.sum())
            self._tokens[layer] = self._tokens.get(layer, 0) + len(experts)
            self._top_k[layer] = experts.shape[-1]

    def layers(self) -> tuple[LayerAgreement, ...]:
        """What has been added, in the layers' order."""
        return tuple(
            LayerAgreement(
                layer=layer,
                same_set=self._same[layer] / tokens,
                overlap=self._kept[layer] / (tokens * self._top_k[layer]),
                top_k=self._top_k[layer],
                tokens=tokens,
            )
            for layer, tokens in self._tokens.items()
        )


def mean_and_worst(layers: Iterable[LayerAgreement]) -> tuple[float, LayerAgreement] | None:
    """Mean `same_set` over layers and the layer where it is lowest; None for no layers."""
    layers = list(layers)
    if not layers:
        return None
    return sum(layer.same_set for layer in layers) / len(layers), min(layers, key=lambda layer: layer.same_set)
