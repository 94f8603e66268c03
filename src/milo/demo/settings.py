"""What the demo trains: sizes and rates, found by measurement for one minute on two CPU cores.

Within a minute the number of steps decides: a shallow model that takes hundreds of small steps ends far below a larger
one that takes few. Three more findings. The embeddings, tied to the output layer, want a rate several times that of
the other weights (with one rate for all, the perplexity ended a quarter higher). A strong pull towards equal use of the
experts costs quality. And matrices must start large enough (0.06 rather than the usual 0.02) for the layers to matter
beside the embeddings: started small, they do so little within a minute that three bits hardly harm the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import MixtralConfig


@dataclass(frozen=True)
class Settings:
    """The model's sizes and the training's rates. Every width is a multiple of 64, the usual group size.

    Attributes:
        vocabulary: Tokens.
        hidden: Width of the residual stream.
        intermediate: Width inside an expert.
        layers: Transformer layers.
        heads: Attention heads of 64.
        experts: Experts in each layer.
        experts_per_token: How many of them a token uses.
        positions: ``max_position_embeddings``: the longest window to judge the model on.
        init: Standard deviation of the initial weights.
        sequence: Tokens in a training window.
        batch: Windows in a step.
        rate: AdamW's peak learning rate.
        embedding_rate: The same for the embeddings.
        betas: AdamW's.
        weight_decay: AdamW's, on matrices.
        balance: Weight of the loss that spreads tokens over the experts.
        clip: Largest norm of the gradient.
        warmup: Share of the time in which the rates rise to their peak.
        final: Share of the peak at which they end.
    """

    vocabulary: int = 2048
    hidden: int = 192
    intermediate: int = 256
    layers: int = 2
    heads: int = 3
    experts: int = 8
    experts_per_token: int = 2
    positions: int = 512
    init: float = 0.06
    sequence: int = 128
    batch: int = 8
    rate: float = 1.5e-3
    embedding_rate: float = 1.2e-2
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    balance: float = 0.001
    clip: float = 1.0
    warmup: float = 0.05
    final: float = 0.02

    def config(self) -> MixtralConfig:
        """The model's configuration for transformers."""
        return MixtralConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            num_local_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            initializer_range=self.init,
            router_aux_loss_coef=self.balance,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
