"""The training loop: AdamW on next-token prediction until the time is up.

The learning rates follow the clock and not a step count, since nobody knows beforehand how many steps a machine
makes: they rise over the first twentieth of the time and fall along a cosine until its end. A training cut short
before its rates have fallen ends much worse, so a budget has to be known to the schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import MixtralForCausalLM

from milo.demo.settings import Settings
from milo.demo.threads import fastest_threads
from milo.errors import MiloError

_REPORT_EVERY = 0.25  # seconds


@dataclass(frozen=True)
class Outcome:
    """What a training did.

    Attributes:
        steps: Optimiser steps made.
        tokens: Tokens trained on.
        seconds: Time it took.
        loss: Training loss at the end in nats a token, smoothed over some twenty steps, balance loss included.
    """

    steps: int
    tokens: int
    seconds: float
    loss: float


def batches(ids: torch.Tensor, sequence: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields int64 ``[batch, sequence]`` without end: the windows of ``ids [T]``, each epoch in a new random order."""
    windows = ids[: len(ids) // sequence * sequence].view(-1, sequence)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            yield windows[chosen]


def fit(
    model: MixtralForCausalLM,
    data: Iterator[torch.Tensor],
    settings: Settings,
    seconds: float,
    progress: Callable[[float, str], None],
) -> Outcome:
    """Trains ``model`` in place, with the number of threads that turns out fastest.

    Args:
        model: The model, in float32.
        data: Token windows, int64 ``[batch, sequence]``.
        settings: Rates and schedule.
        seconds: Wall-clock budget, from when the threads are chosen; at least one step is made.
        progress: Called as ``progress(fraction, message)`` a few times a second.

    Raises:
        MiloError: The loss is not finite.
    """
    model.train()
    sample = next(data)
    with fastest_threads(lambda: _backward(model, sample)) as threads:
        model.zero_grad()
        outcome = _run(model, data, settings, seconds, lambda f, m: progress(f, f"{m}, {threads} thread(s)"))
    model.eval()
    if not math.isfinite(outcome.loss):
        raise MiloError(f"the demo's training diverged ({outcome.steps} steps): try another seed")
    return outcome


def _backward(model: MixtralForCausalLM, window: torch.Tensor) -> float:
    """Adds one batch's gradients and returns its loss, that of balancing the experts included."""
    loss = model(input_ids=window, labels=window, output_router_logits=True, use_cache=False).loss
    loss.backward()
    return loss.item()


def _run(
    model: MixtralForCausalLM,
    data: Iterator[torch.Tensor],
    settings: Settings,
    seconds: float,
    progress: Callable[[float, str], None],
) -> Outcome:
    """Takes optimiser steps until the time is up."""
    optimizer = _optimizer(model, settings)
    peaks = [group["lr"] for group in optimizer.param_groups]
    begin = time.monotonic()
    elapsed = reported = 0.0
    steps = tokens = 0
    smooth = 0.0
    while steps == 0 or elapsed < seconds:
        factor = rate_factor(elapsed / seconds, settings)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        window = next(data)
        loss = _backward(model, window)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        tokens += window.numel()
        smooth += (loss - smooth) / min(steps, 20)
        elapsed = time.monotonic() - begin
        if elapsed - reported >= _REPORT_EVERY:
            progress(min(1.0, elapsed / seconds), f"training: step {steps}, loss {smooth:.2f}")
            reported = elapsed
    return Outcome(steps=steps, tokens=tokens, seconds=elapsed, loss=smooth)


def rate_factor(done: float, settings: Settings) -> float:
    """The share of the peak learning rate when ``done`` (0 to 1) of the time has passed: linear rise, cosine fall."""
    if done < settings.warmup:
        return max(done / settings.warmup, settings.final)
    fall = min(1.0, (done - settings.warmup) / (1 - settings.warmup))
    return settings.final + (1 - settings.final) * (1 + math.cos(math.pi * fall)) / 2


def _optimizer(model: MixtralForCausalLM, settings: Settings) -> torch.optim.AdamW:
    embeddings = [model.get_input_embeddings().weight]  # the tied output layer's as well
    others = [p for p in model.parameters() if p is not embeddings[0]]
    groups = [
        {"params": embeddings, "lr": settings.embedding_rate, "weight_decay": 0.0},
        {"params": [p for p in others if p.dim() > 1], "lr": settings.rate},
        {"params": [p for p in others if p.dim() <= 1], "lr": settings.rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
