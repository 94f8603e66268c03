"""Loading a compressed folder into any `nn.Module` whose linear layers carry the checkpoint's names.

For models that transformers has no class for (checkpoints that bring their own code, such as the first DeepSeek-MoE):
build the module, then let this put the compressed matrices in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.hub import find_model
from milo.checkpoint.inventory import Kind
from milo.errors import FormatError, UnsupportedModelError
from milo.modules.matrix import CompressedLinear


@torch.no_grad()
def load_compressed(module: nn.Module, folder: str | Path) -> nn.Module:
    """Replace every compressed linear of `module` and load all other tensors.

    Args:
        module: its `nn.Linear`s stand where the checkpoint's names say (`layers.3.mlp.experts.5.up_proj`); may be on
            the meta device.
        folder: compressed folder or hub name.

    Returns:
        The same module, in place. Uncompressed tensors keep the dtype of the file.

    Raises:
        UnsupportedModelError: the checkpoint holds fused stacks, which only a known class can use.
        FormatError: a name has no linear layer of that shape in the module, or tensors are left over or missing.
    """
    checkpoint = CompressedCheckpoint(find_model(str(folder)))
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for row in checkpoint.plan.rows:
        if row.kind is Kind.STACK:
            raise UnsupportedModelError(f"{row.name} is a fused stack of experts; load it through transformers")
        for path, rank in zip(row.matrices(), row.ranks, strict=True):
            linear = _linear(module, path)
            if linear is None or tuple(linear.weight.shape) != row.shape:
                raise FormatError(f"{type(module).__name__} has no linear layer {path} of shape {row.shape}")
            parent, _, leaf = path.rpartition(".")
            compressed = CompressedLinear.like(linear, row.encoding, rank, "meta")
            setattr(module.get_submodule(parent), leaf, compressed)
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise FormatError(f"{folder} and {type(module).__name__} do not fit: missing {missing}, left over {unexpected}")
    return module


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None
