"""Several compressed models against one original, on the same windows: paired differences.

Two recipes judged on the same text share its difficult windows, so the difference between their divergences is known
far better than either divergence: its standard error comes from the spread of the windows' *differences*. The
original's log-probabilities are computed once and kept, since every recipe is compared with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from milo.evaluate.windows import check_fits, cut, in_batches, judging, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Scores:
    """One model on every window.

    Attributes:
        kl: float64 `[W]`, mean KL(original ‖ model) of the window's predictions, in nats; zeros for the original.
        nll: float64 `[W]`, mean negative log-likelihood of the window's tokens.
        tokens: float64 `[W]`, predictions in the window.
    """

    kl: torch.Tensor
    nll: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean_kl(self) -> float:
        """Over predictions."""
        return _mean(self.kl, self.tokens)

    @property
    def kl_se(self) -> float:
        """Standard error of `mean_kl` over windows."""
        return _standard_error(self.kl, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(_mean(self.nll, self.tokens))


def kl_difference(first: Scores, second: Scores) -> tuple[float, float]:
    """Mean KL of `first` minus that of `second`, and the standard error of the difference over windows."""
    difference = first.kl - second.kl
    return _mean(difference, first.tokens), _standard_error(difference, first.tokens)


class Reference:
    """An original model's predictions on a text.

    Args:
        model: the original.
        ids: int64 `[T]`.
        window: tokens a window; windows stand side by side.
        batch: windows a forward pass.
        held: device that keeps the original's log-probabilities, 4 bytes a token and word.
        progress: called with (fraction, message).

    Raises:
        MiloError: the text does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        window: int,
        batch: int = 8,
        held: str = "cpu",
        progress: Progress = lambda fraction, message: None,
    ) -> None:
        check_fits(model, ids, window)
        self._ids, self._held = ids, held
        self._runs = list(in_batches(cut(ids.numel(), window, window), batch))
        self._kept: list[torch.Tensor] = []  # [windows, L - 1, vocabulary] a run
        self.original = self._score(model, progress)

    def score(self, model: PreTrainedModel, progress: Progress = lambda fraction, message: None) -> Scores:
        """Judge another model on the same windows."""
        return self._score(model, progress)

    def _score(self, model: PreTrainedModel, progress: Progress) -> Scores:
        first = not self._kept
        kl, nll, tokens = [], [], []
        with judging(model):
            for number, run in enumerate(self._runs):
                found = logits(model, self._ids, run)[:, :-1].float().log_softmax(-1)
                targets = torch.stack([self._ids[w.begin + 1 : w.end] for w in run]).to(found.device)
                nll.append(-found.gather(-1, targets[..., None])[..., 0].mean(-1).double().cpu())
                tokens.append(torch.full((len(run),), float(targets.shape[1]), dtype=torch.float64))
                if first:
                    self._kept.append(found.to(self._held))
                    kl.append(torch.zeros(len(run), dtype=torch.float64))
                else:
                    original = self._kept[number].to(found.device)
                    kl.append((original.exp() * (original - found)).sum(-1).mean(-1).double().cpu())
                progress((number + 1) / len(self._runs), f"{number + 1} of {len(self._runs)} batches")
        return Scores(torch.cat(kl), torch.cat(nll), torch.cat(tokens))


def _mean(values: torch.Tensor, weights: torch.Tensor) -> float:
    return (values * weights).sum().item() / weights.sum().item()


def _standard_error(values: torch.Tensor, weights: torch.Tensor) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    deviations = (values - _mean(values, weights)) * weights
    return math.sqrt(count / (count - 1)) * deviations.norm().item() / weights.sum().item()
