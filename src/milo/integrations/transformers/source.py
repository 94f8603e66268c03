"""Opening a source checkpoint with what transformers knows of its class."""

from __future__ import annotations

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
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    known = meta_model(checkpoint.folder)
    return Source.of(checkpoint, placements(known, shapes) if known is not None else None)
