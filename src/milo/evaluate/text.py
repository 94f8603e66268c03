"""The text that a model is judged on, and its tokens.

Perplexities are comparable only over the same text, joined the same way and tokenised the same way. WikiText-2's
test split, its rows joined by blank lines, is what the compression literature reports; any UTF-8 file does for
comparing a compressed model with its original.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from milo.errors import MiloError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIKITEXT2 = "WikiText-2 test"


def load_text(path: str | Path | None = None) -> tuple[str, str]:
    """Reads a text file, or WikiText-2's test split where no file is given.

    Args:
        path: A UTF-8 text file. None asks the optional ``datasets`` package for WikiText-2 (raw, test split;
            downloaded on first use) and joins its rows by blank lines.

    Returns:
        ``(text, name)``: the text, and a name for it to print beside results.

    Raises:
        MiloError: The file cannot be read or is not UTF-8; or no file is given and ``datasets`` is not
            installed or cannot get the data.
    """
    if path is None:
        return _wikitext2(), WIKITEXT2
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8"), path.name
    except OSError as error:
        raise MiloError(f"cannot read the text file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MiloError(f"the text file {path} is not UTF-8 (byte {error.start}): convert it first") from error


def _wikitext2() -> str:
    remedy = "Give a text file of your own instead: --text FILE"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MiloError(f"WikiText-2 needs the 'datasets' package: pip install 'milo-moe[eval]'. {remedy}") from error
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    # `datasets` raises many unrelated types for a missing network: connection errors, hub errors, OSError.
    except Exception as error:
        raise MiloError(f"could not get WikiText-2 ({type(error).__name__}: {error}). {remedy}") from error
    return "\n\n".join(rows["text"])


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None) -> torch.Tensor:
    """Turns text into one long row of token ids.

    No special tokens are added, but for one: a tokenizer which puts BOS in front of a text by default (Llama's
    and Mixtral's do) puts it in front of this one, once, since such models expect it and the published figures
    have it. EOS, CLS and SEP are never added.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        text: The text, of any length; longer than the model's context is expected here and draws no warning.
        max_tokens: Keep only this many tokens from the start; None keeps all.

    Returns:
        int64 ``[T]``.

    Raises:
        MiloError: The text has no tokens.
        ValueError: ``max_tokens`` is not positive.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    ids = _plain_ids(tokenizer, text)
    if not ids:
        raise MiloError("the text is empty: there is nothing to evaluate")
    if _adds_bos(tokenizer):
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's default is BOS in front, seen on a one-letter text.

    There is no attribute to ask: ``add_bos_token`` is missing from some tokenizers and ignored by others.
    """
    default = tokenizer("a")["input_ids"]
    plain = _plain_ids(tokenizer, "a")
    return default != plain and default[0] == tokenizer.bos_token_id and plain[:1] != default[:1]
