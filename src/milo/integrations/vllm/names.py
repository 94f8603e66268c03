"""Between the checkpoint's tensors and vLLM's loaders: names that vLLM's models would not understand.

`AutoWeightsLoader` sends every tensor through the mapper that a quantisation config offers it (for scales of the
key-value cache). Ours does three more things on the way:

* a stack, one tensor of all experts, becomes a tensor an expert under the names that per-expert checkpoints have;
* every tensor carries its name along, for layers that vLLM builds without telling a method where they stand
  (attention of the first DeepSeek-MoE);
* a head that is tied to the embedding gets the embedding's weights: of some models (DeepSeek-V2) vLLM ignores
  `tie_word_embeddings` and leaves the head as it was allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from vllm.model_executor.models.utils import WeightsMapper

from milo.plan.plan import Row


@dataclass
class Stack:
    """A stack whose members go to the loaders one by one.

    Attributes:
        row: of the plan.
        names: of a member, `{}` for its number; `gate_up_proj` feeds two.
    """

    row: Row
    names: list[str]

    def members(self, suffix: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        first = 0
        for member, rank in enumerate(self.row.ranks):
            last = first + rank
            if rank or not suffix.startswith("lowrank"):
                for name in self.names:  # a tensor object each, since vLLM notes on it where it goes
                    cut = tensor[first:last] if suffix.startswith("lowrank") else tensor[member]
                    yield f"{name.format(member)}.{suffix}", cut
            first = last


@dataclass
class NamingMapper(WeightsMapper):
    """vLLM's mapper, and what the module's docstring says.

    Attributes:
        stacks: by the stored matrix's name; filled while the model is built.
        heads: paths of heads that share the embedding's weights.
    """

    stacks: Mapping[str, Stack] = field(default_factory=dict)
    heads: Sequence[str] = ()

    def __or__(self, other: WeightsMapper) -> NamingMapper:
        return NamingMapper(**vars(super().__or__(other)), stacks=self.stacks, heads=self.heads)

    def __ror__(self, other: WeightsMapper) -> NamingMapper:
        return NamingMapper(**vars(other.__or__(self)), stacks=self.stacks, heads=self.heads)

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        tied: dict[str, torch.Tensor] = {}
        own: set[str] = set()  # heads that the checkpoint stores after all
        for name, tensor in super().apply(self._split(weights)):
            if not hasattr(tensor, "milo_name"):  # models send tensors on to their parts, and these through here again
                tensor.milo_name = name
            yield name, tensor
            own |= {head for head in self.heads if name == f"{head}.weight"}
            if name.endswith(".embed_tokens.weight"):
                inside = [head for head in self.heads if name.startswith(head.rpartition("lm_head")[0])]
                tied |= {head: tensor.view_as(tensor) for head in inside}
        yield from ((f"{head}.weight", tensor) for head, tensor in tied.items() if head not in own)

    def _split(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            matrix, _, suffix = name.rpartition(".")
            stack = self.stacks.get(matrix)
            if stack is None:
                yield name, tensor
            else:
                yield from stack.members(suffix, tensor)
