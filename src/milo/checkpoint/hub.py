"""Finding a model: a local folder as it is, a hub name through huggingface_hub's cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from milo.errors import CheckpointError

# Weights in safetensors, configs, tokenizers, modelling code; not the same weights a second time as pickles.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja", "LICENSE*", "README.md", "*.tiktoken"]


def find_model(model: str) -> Path:
    """Local folder of a model, downloaded if `model` is a hub name.

    Args:
        model: a folder, or a name such as `mistralai/Mixtral-8x7B-v0.1`.

    Raises:
        CheckpointError: neither a folder nor a model that can be downloaded.
    """
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        return Path(model).expanduser()
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model} is no local folder and cannot be downloaded ({type(error).__name__}); check the name, the "
            "network and, for a gated model, `hf auth login`"
        ) from error
