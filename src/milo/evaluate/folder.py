"""Judging a model folder: exact bytes, perplexity in both protocols, divergence from the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from milo.checkpoint.compressed import QUANT_METHOD, CompressedCheckpoint
from milo.checkpoint.hub import find_model
from milo.checkpoint.source import Checkpoint, load_json
from milo.errors import CheckpointError, MiloError
from milo.evaluate.divergence import Divergence, divergence
from milo.evaluate.perplexity import Perplexity, perplexity
from milo.evaluate.scores import TaskEvaluation
from milo.evaluate.text import tokenize

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Size:
    """Exact bytes.

    Attributes:
        compressed_weights: weights in compressed matrices; 0 for an uncompressed model.
        compressed_bytes: bytes of their tensors.
        bits_per_weight: the ratio; None for an uncompressed model.
        tensor_bytes: all tensors of the folder.
        folder_bytes: every file of the folder.
    """

    compressed_weights: int
    compressed_bytes: int
    bits_per_weight: float | None
    tensor_bytes: int
    folder_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """What `milo eval` reports; fields that were not measured are None."""

    model: str
    text: str | None
    recipe: str | None
    size: Size
    contiguous: Perplexity | None
    sliding: Perplexity | None
    original: str | None
    divergence: Divergence | None
    tasks: TaskEvaluation | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_compressed(folder: Path) -> bool:
    """Whether `config.json` says that MiLo compressed the folder."""
    config = load_json(folder / "config.json")
    return (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def measure_size(folder: Path) -> Size:
    """Exact bytes of a folder, compressed by MiLo or not, from headers and file sizes."""
    checkpoint = CompressedCheckpoint(folder) if is_compressed(folder) else Checkpoint(folder)
    tensor_bytes = sum(info.nbytes for info in checkpoint.tensors.values())
    folder_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not isinstance(checkpoint, CompressedCheckpoint):
        return Size(0, 0, None, tensor_bytes, folder_bytes)
    packed = {name for name, _ in checkpoint.plan.tensors()}
    nbytes = sum(checkpoint.tensors[name].nbytes for name in packed)
    weights = checkpoint.plan.parameters
    return Size(weights, nbytes, 8 * nbytes / weights, tensor_bytes, folder_bytes)


def load_model(folder: Path, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A causal LM ready to be judged.

    Args:
        folder: original or compressed.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: a torch device, or `auto` for accelerate's placement.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    if is_compressed(folder):
        CompressedCheckpoint(folder)  # its errors name the tensor; transformers' would be warnings
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, device_map=device)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or a `CheckpointError` that says it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder} has no usable tokenizer: {error}") from error


def find_original(folder: Path, given: str | None) -> str | None:
    """The model to compare with: the given one, or a compressed folder's recorded source if it still exists.

    Raises:
        MiloError: it is the folder itself.
    """
    if given is None and is_compressed(folder):
        recorded = load_json(folder / "config.json")["quantization_config"].get("base_model")
        given = recorded if recorded is not None and Path(recorded).is_dir() else None
    if given is not None and Path(given).resolve() == folder.resolve():
        raise MiloError(f"{given} is the folder under test; --original names what it was made from")
    return given


def describe_folder(folder: str) -> Evaluation:
    """What needs no model run: the recipe and exact bytes.

    Raises:
        MiloError: the folder cannot be used.
    """
    path = find_model(folder)
    config = load_json(path / "config.json").get("quantization_config") or {}
    recipe = (config.get("plan") or {}).get("recipe")
    return Evaluation(folder, None, recipe, measure_size(path), None, None, None, None)


def evaluate_folder(
    folder: str,
    text: str,
    text_name: str,
    *,
    original: str | None = None,
    window: int = 2048,
    stride: int | None = 512,
    max_tokens: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = lambda fraction, message: None,
) -> Evaluation:
    """Measure a folder.

    Args:
        folder: a compressed or original model.
        text: what to judge on.
        text_name: for the report.
        original: the model to diverge from; None takes a compressed folder's recorded source if it still exists.
        window: tokens a window, for both protocols.
        stride: of the paper's sliding protocol; None or `window` measures contiguous windows only.
        max_tokens: judge on the first tokens only.
        dtype: compute dtype of both models.
        device: where both run.
        progress: called with (fraction, message).

    Raises:
        MiloError: the folder, its tokenizer or the text cannot be used.
    """
    described = describe_folder(folder)
    path = find_model(folder)
    original = find_original(path, original)
    ids = tokenize(load_tokenizer(path), text, max_tokens)
    model = load_model(path, dtype, device)
    contiguous = perplexity(model, ids, window=window, progress=progress)
    sliding = None
    if stride is not None and stride < window:
        sliding = perplexity(model, ids, window=window, stride=stride, progress=progress)
    diverged = None
    if original is not None:
        reference = load_model(find_model(original), dtype, device)
        diverged = divergence(model, reference, ids, window=window, progress=progress)
    return replace(
        described, text=text_name, contiguous=contiguous, sliding=sliding, original=original, divergence=diverged
    )
