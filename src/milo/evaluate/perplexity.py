r"""Perplexity: how surprised a model is by a text.

With :math:`x` the tokens and :math:`p` the model, the negative log-likelihood of a token is
:math:`-\ln p(x_t \mid x_{<t})` nats, and perplexity is the exponential of its mean. The mean depends on how much
context each token has, hence on the protocol:

* **Non-overlapping windows** (``stride=None``), as GPTQ and most papers after it use: each window is judged on
  its own, on its ``window - 1`` predictions. The mean is over all tokens, and the short last window counts by its
  length.
* **Sliding window** (``stride < window``), as MiLo's paper uses (2048/512) and Hugging Face's guide describes:
  each window after the first scores only the ``stride`` tokens which are new, with at least ``window - stride``
  tokens of context. The official script takes each window's mean and then the *unweighted mean of the windows'
  means*; so does this one, in order to reproduce its figures, although the last window is short and the first
  one scores ``window - 1`` tokens.

Sliding gives lower figures, since tokens have more context (Mixtral-8x7B: 3.42 against 3.84): never compare
figures across protocols, windows or tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from milo.evaluate.windows import check_fits, cut, in_batches, judging, logits, scored_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        ppl: ``exp(nll)``; infinite where that overflows, NaN where the model's logits are NaN.
        nll: Mean negative log-likelihood in nats: of the tokens for non-overlapping windows, of the windows'
            means for sliding ones.
        tokens: Tokens scored.
        window: Tokens a window holds.
        stride: Tokens between the begins of windows; equal to ``window`` where they do not overlap.
    """

    ppl: float
    nll: float
    tokens: int
    window: int
    stride: int


def perplexity(
    model: PreTrainedModel,
    ids: torch.Tensor,
    window: int = 2048,
    stride: int | None = None,
    batch: int = 4,
    progress: Callable[[float, str], None] | None = None,
) -> Perplexity:
    """Measures a causal language model's perplexity on a row of tokens.

    The windows' logits are the largest thing held: ``batch × window × vocabulary`` in the model's dtype.
    Log-likelihoods are taken in float32 and summed in float64.

    Args:
        model: Any Hugging Face causal LM, on any device.
        ids: int64 ``[T]``, on any device.
        window: Tokens a window holds, at most the model's ``max_position_embeddings`` (or ``T`` is).
        stride: None or ``window`` for non-overlapping windows, less for the sliding protocol.
        batch: Windows run together. It changes speed and memory, and the result only by rounding.
        progress: Called as ``progress(fraction done, message)`` after each batch.

    Raises:
        MiloError: The text is too short, its tokens are not the model's, or the window exceeds the model's
            positions.
        ValueError: An argument is out of range.
    """
    stride = window if stride is None else stride
    check_fits(model, ids, window)
    windows = cut(ids.numel(), window, stride)
    sums: list[float] = []
    with judging(model):
        for run in in_batches(windows, batch):
            for window_logits, w in zip(logits(model, ids, run), run, strict=True):
                sums.append(_nll_sum(window_logits, ids[w.end - w.scored : w.end]))
            if progress is not None:
                progress(len(sums) / len(windows), f"perplexity: {len(sums)} of {len(windows)} windows")
    tokens = sum(w.scored for w in windows)
    if stride == window:
        nll = sum(sums) / tokens
    else:
        nll = sum(s / w.scored for s, w in zip(sums, windows, strict=True)) / len(windows)
    # torch's exp, for math.exp raises where the result overflows.
    ppl = torch.tensor(nll, dtype=torch.float64).exp().item()
    return Perplexity(ppl=ppl, nll=nll, tokens=tokens, window=window, stride=stride)


def _nll_sum(window_logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sums the targets' negative log-likelihoods: logits ``[L, vocabulary]``, int64 ``[scored]`` → nats."""
    total = torch.zeros((), dtype=torch.float64, device=window_logits.device)
    remaining = targets.to(window_logits.device)
    for chunk in scored_chunks(window_logits, targets.numel()):
        now, remaining = remaining[: len(chunk)], remaining[len(chunk) :]
        nll = torch.nn.functional.cross_entropy(chunk.float(), now, reduction="none")
        total += nll.double().sum()
    return total.item()
