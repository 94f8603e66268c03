"""A model that is run, forwards and backwards, with the weights of one layer in memory.

Embeddings, norms and head stay; the parameters of a layer have shapes but no storage until the layer runs. Gradient
checkpointing does the rest: the forward pass keeps nothing but the layers' inputs, the backward pass runs every layer
once more before it differentiates it, and each of these runs begins by reading the layer from the checkpoint and
letting the one before go. A pass therefore reads the checkpoint once, and once more backwards.

transformers offers the place for it: a layer calls `_gradient_checkpointing_func` instead of itself if it is told to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from milo.checkpoint.inventory import Placement
from milo.checkpoint.roles import EXPERT_INDEX
from milo.checkpoint.source import Checkpoint
from milo.errors import CheckpointError, UnsupportedModelError
from milo.integrations.transformers.structure import placements


@contextmanager
def streamed_model(source: Checkpoint, device: str = "cpu") -> Iterator[PreTrainedModel]:
    """The model of a checkpoint in float32, for passes with or without gradients (and without a cache).

    Args:
        source: the checkpoint.
        device: where it runs.

    Raises:
        CheckpointError: transformers has no class for it.
        UnsupportedModelError: the class's layers or weights are not understood.
    """
    model = _empty_model(source).eval()
    stream = _Stream(source, model, device)
    model.enable_input_require_grads()  # or no gradient would reach a layer whose inputs need none
    try:
        yield model
    finally:
        model.disable_input_require_grads()
        stream.release()


class _Stream:
    """Fills a model's layers one at a time."""

    def __init__(self, source: Checkpoint, model: PreTrainedModel, device: str) -> None:
        self._source = source
        self._current: nn.Module | None = None
        self._feeds: dict[str, list[tuple[str, Placement]]] = defaultdict(list)
        shapes = {name: info.shape for name, info in source.tensors.items() if not source.is_block_scale(name)}
        for name, placement in placements(model, shapes).items():
            self._feeds[f"{placement.module}.{placement.parameter}"].append((name, placement))
        _hollow_out(model, device)
        model.tie_weights()
        self._paths: dict[nn.Module, str] = {
            m: path for path, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)
        }
        if not self._paths:
            raise UnsupportedModelError(f"{type(model).__name__} has no layers that can be run one at a time")
        inside = tuple(f"{path}." for path in self._paths.values())
        self._fill({path: m for path, m in model.named_modules() if not f"{path}.".startswith(inside)})
        for layer in self._paths:
            layer.register_forward_pre_hook(lambda layer, args: self._enter(layer))
            # Both are asked for; what is inside the layer stays in eval mode.
            layer.gradient_checkpointing = layer.training = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = partial(self._run, layer)  # type: ignore[assignment]

    def release(self) -> None:
        """Let the last layer go."""
        if self._current is not None:
            for parameter in self._current.parameters():
                parameter.untyped_storage().resize_(0)
            self._current = None

    def _run(self, layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            self._enter(layer)
            return forward(*inputs)

        if not torch.is_grad_enabled():
            return run(*args)
        return recomputed(run, *args, use_reentrant=True, preserve_rng_state=False)

    def _enter(self, layer: nn.Module) -> None:
        if layer is not self._current:
            self.release()
            self._current = layer
            self._fill(dict(layer.named_modules(prefix=self._paths[layer])))

    @torch.no_grad()
    def _fill(self, modules: Mapping[str, nn.Module]) -> None:
        """Read the modules' own parameters and buffers."""
        empty = []
        for path, module in modules.items():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                full = f"{path}.{name}" if path else name
                for source, placement in self._feeds.get(full, []):
                    tensor.untyped_storage().resize_(tensor.nbytes)
                    # `.data`: a pass that is being differentiated must not take this for a change of its inputs.
                    _copy(tensor.data, self._source.read(source), source, placement, module)
                empty.append((full, tensor))
        for full, tensor in empty:
            if tensor.numel() and not tensor.untyped_storage().size():
                raise CheckpointError(f"{self._source.folder} has no tensor for {full}")


def _empty_model(source: Checkpoint) -> PreTrainedModel:
    """The model with its buffers, which no checkpoint holds, and parameters on the meta device."""
    try:
        config = AutoConfig.from_pretrained(source.folder)
        found = next((getattr(transformers, n) for n in config.architectures or [] if hasattr(transformers, n)), None)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{source.folder}: {error}") from error
    if found is None:
        raise CheckpointError(f"{source.folder}: transformers has no class for it")
    with init_empty_weights(include_buffers=False):
        return found._from_config(config, dtype=torch.float32)


def _hollow_out(model: PreTrainedModel, device: str) -> None:
    """Put a model on a device, its parameters with shapes and dtypes but nothing behind them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                tensor.untyped_storage().resize_(0)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _copy(into: torch.Tensor, value: torch.Tensor, name: str, placement: Placement, module: nn.Module) -> None:
    """Put a checkpoint tensor where the model keeps it."""
    if placement.kind == "experts":
        stack = into.mT if module.is_transposed else into
        size = stack.shape[1] // placement.parts
        into = stack[:, placement.part * size : (placement.part + 1) * size]
        expert = EXPERT_INDEX.search(name)
        into = into[int(expert[2])] if expert else into
        value = value.mT if placement.transposed else value
    if into.shape != value.shape:
        raise UnsupportedModelError(
            f"{name} {tuple(value.shape)} does not fit {placement.module}.{placement.parameter} {tuple(into.shape)}"
        )
    into.copy_(value)
