"""Opening a source checkpoint with what transformers knows of its class."""

from __future__ import annotations

from transformers import PreTrainedModel

from milo.checkpoint.hub import find_model
from milo.checkpoint.source import Checkpoint
from milo.integrations.transformers.structure import meta_model, placements
from milo.pipeline.planning import Source


def open_source(model: str) -> Source:
    """Open a model folder or hub name and take its inventory, reading headers only.

    Args:
        model: folder or hub name.

    Raises:
        CheckpointError: not a usable checkpoint.
        UnsupportedModelError: its experts are not understood.
    """
    checkpoint = Checkpoint(find_model(model))
    return source_of(checkpoint, meta_model(checkpoint.folder))


def source_of(checkpoint: Checkpoint, model: PreTrainedModel | None) -> Source:
    """The inventory of a checkpoint as `model` would load it; by names alone where there is no model."""
    if model is None:
        return Source.of(checkpoint, None)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return Source.of(checkpoint, placements(model, shapes))
