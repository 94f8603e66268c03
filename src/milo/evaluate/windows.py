"""Cutting a long token row into the windows that a model sees.

A causal model judges a text in windows of bounded length. In each, the prediction of token ``t`` is read from the
logits at ``t - 1``, so a window's first token is never predicted inside it. Windows may overlap: then only the
tokens that no earlier window has reached are scored, and what stands before them is context.

::

    stride = window                      stride < window
    |-=======|                           |-=======|
             |-=======|                      |----====|      - context only
                      |-====|                    |----=|     = scored

Only the last window can be short, so all others run in batches without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from milo.errors import MiloError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32 elements that a comparison over the vocabulary may hold at once: 64 MiB.
_CHUNK_ELEMENTS = 2**24


class Window(NamedTuple):
    """Tokens ``begin`` to ``end`` of the row, of which the last ``scored`` are predicted and judged."""

    begin: int
    end: int
    scored: int


def cut(length: int, window: int, stride: int) -> list[Window]:
    """Cuts a row of ``length`` tokens into windows which score each token but the first at most once.

    Args:
        length: Tokens in the row.
        window: Tokens a window holds; the last may be shorter.
        stride: Tokens from one window's begin to the next's, from 1 to ``window``.

    Raises:
        MiloError: Fewer than two tokens: nothing is predicted from anything.
        ValueError: ``window`` or ``stride`` is out of range.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, not {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to the window ({window}), not {stride}")
    if length < 2:
        raise MiloError(f"the text is too short to evaluate: {length} token(s), at least 2 are needed")
    windows = []
    reached = 0
    begin = 0
    while reached < length:
        end = min(begin + window, length)
        scored = min(end - reached, end - begin - 1)
        if scored:  # a lone last token behind the last full window has nothing to be predicted from
            windows.append(Window(begin, end, scored))
        reached = end
        begin += stride
    return windows


def in_batches(windows: list[Window], batch: int) -> Iterator[list[Window]]:
    """Yields runs of at most ``batch`` neighbouring windows of one length."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    run: list[Window] = []
    for window in windows:
        if run and (len(run) == batch or window.end - window.begin != run[0].end - run[0].begin):
            yield run
            run = []
        run.append(window)
    if run:
        yield run


def check_fits(model: PreTrainedModel, ids: torch.Tensor, window: int) -> None:
    """Refuses a row or window which the model cannot take, before it becomes a device-side failure.

    Raises:
        ValueError: ``ids`` is not an integer row ``[T]``.
        MiloError: A token is not in the model's vocabulary, or windows of this text would be longer than the
            positions the model was made for (``max_position_embeddings``). That is an error and not a warning:
            the figure would measure extrapolation, not the model.
    """
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"ids must be an integer row [T], not {ids.dtype} {list(ids.shape)}")
    config = model.config.get_text_config()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise MiloError(
            f"token ids reach from {int(ids.min())} to {int(ids.max())}, but the model knows 0 to "
            f"{config.vocab_size - 1}: this tokenizer belongs to another model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and min(window, ids.numel()) > positions:
        raise MiloError(
            f"a window of {window} tokens is longer than the model's {positions} positions "
            f"(max_position_embeddings): use a window of at most {positions}"
        )


@contextmanager
def judging(*models: PreTrainedModel) -> Iterator[None]:
    """Puts models into eval mode without gradients, and training flags back afterwards.

    ``no_grad`` rather than ``inference_mode``: buffers which a module builds lazily here must stay usable
    when the caller trains later.
    """
    training = [m.training for m in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, flag in zip(models, training, strict=True):
            model.train(flag)


def logits(model: PreTrainedModel, ids: torch.Tensor, run: list[Window]) -> torch.Tensor:
    """Runs the model on a run of equally long windows: ``[len(run), L, vocabulary]`` in the model's dtype."""
    rows = torch.stack([ids[w.begin : w.end] for w in run])
    # A model offloaded by accelerate reports "meta"; its hooks move the input themselves.
    device = model.device if model.device.type != "meta" else torch.device("cpu")
    return model(input_ids=rows.to(device), use_cache=False).logits


def scored_chunks(window_logits: torch.Tensor, scored: int) -> Iterator[torch.Tensor]:
    """Yields the rows of ``[L, vocabulary]`` which predict the last ``scored`` tokens, some rows at a time.

    The caller upcasts and normalises each chunk, so that the float32 copy of the logits stays small.
    """
    length, vocabulary = window_logits.shape
    yield from window_logits[length - 1 - scored : length - 1].split(max(1, _CHUNK_ELEMENTS // vocabulary))
