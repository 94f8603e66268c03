r"""Divergence: how far a compressed model's predictions have moved from the original's.

Perplexity asks whether the text became more surprising, so errors for and against it cancel, and the text's own
randomness drowns small damage. The Kullback-Leibler divergence

.. math:: \mathrm{KL}(p \,\|\, q) = \sum_v p(v) \ln \frac{p(v)}{q(v)}

between the original's distribution :math:`p` over the next token and the compressed model's :math:`q` compares
the two models directly, token by token: it is zero only where they agree on everything and never cancels. It
tells two compressions apart on a few thousand tokens where perplexity needs a hundred thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from milo.errors import MiloError, UnsupportedModelError
from milo.evaluate.router import AgreementTally, LayerAgreement
from milo.evaluate.windows import check_fits, cut, in_batches, judging, logits, scored_chunks
from milo.integrations.transformers.routing import experts_blocks, watched_choices

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """A compressed model's distance from its original on a text.

    Attributes:
        kl: Mean KL(original ‖ model) of a prediction, in nats.
        kl_se: Standard error of ``kl``. The predictions of one window depend on each other, so this is taken
            from the spread of the windows' means (a clustered standard error, which lets the last window be
            short); NaN for a single window.
        kl_p50: Median of the predictions' KL; likewise ``kl_p90`` and ``kl_p99``, the damage in the tail.
        kl_p90: 90th percentile.
        kl_p99: 99th percentile.
        top1: Share of predictions, from 0 to 1, where both models rank the same token first.
        tokens: Predictions compared.
        window: Tokens a window holds.
        routing: Whether each token keeps its experts, a row a layer, over all tokens of the windows; empty for
            models without experts, or whose experts are modules of their own (the choice is then not handed over).
    """

    kl: float
    kl_se: float
    kl_p50: float
    kl_p90: float
    kl_p99: float
    top1: float
    tokens: int
    window: int
    routing: tuple[LayerAgreement, ...] = ()


def divergence(
    model: PreTrainedModel,
    original: PreTrainedModel,
    ids: torch.Tensor,
    window: int = 2048,
    batch: int = 4,
    progress: Callable[[float, str], None] | None = None,
) -> Divergence:
    """Compares a model's next-token distributions with the original's.

    Both run on the same non-overlapping windows, one batch at a time, and the same ``window - 1`` predictions of
    each window count as in :func:`milo.evaluate.perplexity`. Two batches of logits are the largest things held.

    Args:
        model: The compressed model, any Hugging Face causal LM.
        original: The model it came from; it may be on another device.
        ids: int64 ``[T]``, on any device.
        window: Tokens a window holds, at most either model's ``max_position_embeddings`` (or ``T`` is).
        batch: Windows run together.
        progress: Called as ``progress(fraction done, message)`` after each batch.

    Raises:
        MiloError: The text is too short, its tokens are not the models', the window exceeds the models'
            positions, or their vocabularies differ in size.
        ValueError: An argument is out of range.
    """
    for each in (model, original):
        check_fits(each, ids, window)
    windows = cut(ids.numel(), window, stride=window)
    kls: list[torch.Tensor] = []
    same = 0
    routing = AgreementTally()
    with _both_routers(model, original) as (chosen, reference), judging(model, original):
        for run in in_batches(windows, batch):
            pairs = zip(logits(model, ids, run), logits(original, ids, run), run, strict=True)
            for window_logits, original_logits, w in pairs:
                kl, agreed = _compare(window_logits, original_logits, w.scored)
                kls.append(kl)
                same += agreed
            routing.add(chosen, reference)
            if progress is not None:
                progress(len(kls) / len(windows), f"divergence: {len(kls)} of {len(windows)} windows")
    every = torch.cat(kls)
    # Sorting, for torch.quantile refuses more than 16 million values.
    ordered = every.sort().values
    p50, p90, p99 = (ordered[round(q * (len(ordered) - 1))].item() for q in (0.5, 0.9, 0.99))
    return Divergence(
        kl=every.mean().item(),
        kl_se=_clustered_standard_error(kls),
        kl_p50=p50,
        kl_p90=p90,
        kl_p99=p99,
        top1=same / len(every),
        tokens=len(every),
        window=window,
        routing=routing.layers(),
    )


@contextmanager
def _both_routers(
    model: PreTrainedModel, original: PreTrainedModel
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """The choices of both models' routers in their latest pass; empty where they cannot be watched."""
    try:
        blocks = experts_blocks(original)
    except UnsupportedModelError:
        blocks = {}
    with watched_choices(model, blocks) as chosen, watched_choices(original, blocks) as reference:
        yield chosen, reference


def _compare(model_logits: torch.Tensor, original_logits: torch.Tensor, scored: int) -> tuple[torch.Tensor, int]:
    """Compares one window's logits, both ``[L, vocabulary]``: the KLs, float64 ``[scored]`` on the CPU, and
    how many predictions have the same first choice."""
    if model_logits.shape != original_logits.shape:
        raise MiloError(
            f"the models' vocabularies differ: {model_logits.shape[-1]} and {original_logits.shape[-1]} tokens; "
            "compare a model with the one it was made from"
        )
    kls = []
    same = 0
    chunks = zip(scored_chunks(model_logits, scored), scored_chunks(original_logits, scored), strict=True)
    for chunk, reference in chunks:
        log_q = chunk.float().log_softmax(-1)
        log_p = reference.to(chunk.device).float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        # Never negative in exact arithmetic; equal distributions may round to about -1e-7.
        kls.append(kl.clamp_min(0).double().cpu())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return torch.cat(kls), same


def _clustered_standard_error(clusters: list[torch.Tensor]) -> float:
    """Standard error of the mean over all values when only the clusters are independent of each other.

    For equal clusters this is the standard deviation of their means over the root of their number.
    """
    count = len(clusters)
    if count < 2:
        return math.nan
    every = torch.cat(clusters)
    deviations = torch.stack([(c - every.mean()).sum() for c in clusters])
    return math.sqrt(count / (count - 1)) * deviations.norm().item() / len(every)
