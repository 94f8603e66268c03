"""The demo's model: a small Mixtral trained from nothing in about a minute on two CPU cores, and kept.

Random weights would not do: compression harms noise alike whatever the recipe. A minute of training gives weights
with outliers, low-rank structure and experts of unequal use, and a held-out perplexity which three bits visibly
harm. The result is an ordinary Hugging Face folder in a cache, under a key of everything it was made from.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import MixtralForCausalLM
from transformers.utils import logging as transformers_logging

from milo.demo.corpus import stdlib_corpus
from milo.demo.fit import batches, fit
from milo.demo.settings import Settings
from milo.demo.vocabulary import train_tokenizer
from milo.errors import MiloError
from milo.evaluate.text import tokenize

# Part of the cache's key: raise it when a change of this package's code makes other models than before.
_VERSION = 1

# Characters to learn the vocabulary from: all of the text would take longer and give much the same merges.
_VOCABULARY_SAMPLE = 1_500_000

# Small enough for several shards, so that the demo's checkpoint looks like a large model's.
_SHARD_SIZE = "2MB"


def train_demo_model(
    cache: Path,
    seconds: float = 60,
    progress: Callable[[float, str], None] = lambda fraction, message: None,
    seed: int = 0,
) -> Path:
    """Trains the demo's model, or finds it in the cache.

    The budget is time. Initial weights and the order of the data depend on ``seed`` alone, but how many steps fit
    into ``seconds``, and hence the weights, depends on the machine and its load.

    Args:
        cache: Folder which keeps trained models; made where missing.
        seconds: Wall-clock time to train. Learning the vocabulary, choosing the number of threads and saving take
            some seconds more.
        progress: Called as ``progress(fraction, message)`` a few times a second.
        seed: Of the initial weights and of the order of the data.

    Returns:
        ``cache/<key>``: bfloat16 safetensors shards with their index, ``config.json``, the tokenizer's files,
        ``training.json`` (steps, tokens, seconds, loss) and ``heldout.txt``, the text to judge the model on. The
        key covers settings, corpus, ``seconds``, ``seed`` and a version. The folder appears complete or not at
        all, also when a training is interrupted or two run at a time.

    Raises:
        MiloError: This Python carries no usable text, or the cache cannot be written.
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, not {seconds}")
    progress(0.0, "reading the standard library")
    settings = Settings()
    text, held_out = stdlib_corpus()
    target = cache / _key(settings, text + held_out, seconds, seed)
    if target.is_dir():
        progress(1.0, "already trained")
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".training-") as temporary:
            folder = Path(temporary) / "model"
            folder.mkdir()
            _train_into(folder, text, settings, seconds, progress, seed)
            (folder / "heldout.txt").write_text(held_out, encoding="utf-8")
            _publish(folder, target)
    except OSError as error:
        raise MiloError(f"cannot keep the demo's model in {cache}: {error}") from error
    return target


def _key(settings: Settings, text: str, seconds: float, seed: int) -> str:
    made_from = {
        "version": _VERSION,
        "settings": asdict(settings),
        "corpus": hashlib.sha256(text.encode()).hexdigest(),
        "seconds": float(seconds),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _train_into(
    folder: Path,
    text: str,
    settings: Settings,
    seconds: float,
    progress: Callable[[float, str], None],
    seed: int,
) -> None:
    """Trains tokenizer and model on ``text`` and saves both, with a record of the training, in ``folder``."""
    progress(0.0, "learning a vocabulary")
    tokenizer = train_tokenizer(text[:_VOCABULARY_SAMPLE], settings.vocabulary)
    data = batches(tokenize(tokenizer, text), settings.sequence, settings.batch, seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = MixtralForCausalLM(settings.config())
    outcome = fit(model, data, settings, seconds, progress)
    progress(1.0, f"trained for {outcome.steps} steps")
    tokenizer.save_pretrained(folder)
    with _without_progress_bars():
        model.bfloat16().save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    record = {**asdict(outcome), "parameters": model.num_parameters()}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silences transformers' bars: progress is reported through the caller's callback alone."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _publish(folder: Path, target: Path) -> None:
    """Renames the finished folder to its name in the cache, unless another process was faster."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
