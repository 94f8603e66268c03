"""What is timed beside our MoE FFN, on the same routing: bf16 products, and Humming's 3- and 4-bit ones.

| peer | weights | products |
|---|---|---|
| `bf16` | bf16 | `torch._grouped_mm` on rows that lie sorted by expert |
| `humming_w3` | uint3, group 64, zero points | Humming's indexed GEMM |
| `humming_w4` | uint4, group 64, symmetric | the same |
| `humming_w4_g128` | uint4, group 128, symmetric | the same |

A peer gives two sets of calls: its two products alone, and the whole FFN, with the activation and the weighted sum of
`glue.py`. Sorting the tokens by expert is done beforehand for all of them and costs them nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from humming_peer import FORMATS, Product
from synthetic import Shape
from timing import Call, attempt, graph_time

PEERS = ("bf16", *FORMATS)


@dataclass(frozen=True)
class Case:
    """Tokens and their routing.

    Attributes:
        routing: as `synthetic.ROUTINGS` names it.
        tokens: T.
        ids: int64 `[T, k]` a layer of the ring.
        weights: float32 `[T, k]`.
    """

    routing: str
    tokens: int
    ids: Sequence[torch.Tensor]
    weights: torch.Tensor


class Peer(Protocol):
    """A ring of layers of one kind."""

    def calls(self, case: Case) -> tuple[list[Call], list[Call]]:
        """The two products alone, and the whole FFN, a call a layer of each."""


class Bf16:
    """`torch._grouped_mm`."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, dtype=torch.bfloat16).mul_(size[1] ** -0.5)

        self._shape = shape
        self._first = [random(shape.experts, shape.hidden, 2 * shape.inner) for _ in range(shape.ring)]
        self._second = [random(shape.experts, shape.inner, shape.hidden) for _ in range(shape.ring)]

    def calls(self, case: Case) -> tuple[list[Call], list[Call]]:
        both = [self._layer(*layer, case.weights) for layer in zip(self._first, self._second, case.ids, strict=True)]
        return [products for products, _ in both], [ffn for _, ffn in both]

    def _layer(
        self, first: torch.Tensor, second: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[Call, Call]:
        from glue import silu_and_mul, weighted_sum

        pairs = ids.numel()
        ends = torch.bincount(ids.flatten(), minlength=self._shape.experts).cumsum(0).int()
        place = ids.flatten().argsort().argsort().int().view_as(ids)
        x = torch.randn(pairs, self._shape.hidden, device=ids.device, dtype=torch.bfloat16)
        h = torch.randn(pairs, self._shape.inner, device=ids.device, dtype=torch.bfloat16)

        def products() -> None:
            torch._grouped_mm(x, first, offs=ends)
            torch._grouped_mm(h, second, offs=ends)

        def ffn() -> torch.Tensor:
            hidden = silu_and_mul(torch._grouped_mm(x, first, offs=ends))
            return weighted_sum(torch._grouped_mm(hidden, second, offs=ends), place, weights)

        return products, ffn


class Humming:
    """Its indexed GEMMs."""

    def __init__(self, label: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        def stack(n: int, k: int) -> list[Product]:
            return [Product(label, n, k, shape.experts, dtype, device) for _ in range(shape.ring)]

        self._shape, self._dtype = shape, dtype
        self._first, self._second = stack(2 * shape.inner, shape.hidden), stack(shape.hidden, shape.inner)

    def calls(self, case: Case) -> tuple[list[Call], list[Call]]:
        both = [self._layer(*layer, case.weights) for layer in zip(self._first, self._second, case.ids, strict=True)]
        return [products for products, _ in both], [ffn for _, ffn in both]

    def _layer(self, first: Product, second: Product, ids: torch.Tensor, weights: torch.Tensor) -> tuple[Call, Call]:
        from glue import silu_and_mul, weighted_sum

        tokens, topk = ids.shape
        x = torch.randn(tokens, self._shape.hidden, device=ids.device, dtype=self._dtype)
        h = torch.randn(tokens * topk, self._shape.inner, device=ids.device, dtype=self._dtype)
        place = torch.arange(tokens * topk, device=ids.device, dtype=torch.int32).view(tokens, topk)
        multiply_first = first.indexed(ids.int(), topk)
        multiply_second = second.indexed(ids.int().view(-1, 1), 1)
        here = torch.where(ids.flatten() == 0)[0]  # of the first expert
        if len(here):
            first.check(x[here // topk], multiply_first(x)[here])
            second.check(h[here], multiply_second(h)[here])

        def products() -> None:
            multiply_first(x)
            multiply_second(h)

        def ffn() -> torch.Tensor:
            return weighted_sum(multiply_second(silu_and_mul(multiply_first(x))), place, weights)

        return products, ffn


def open_peer(label: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Peer:
    return Bf16(shape, device) if label == "bf16" else Humming(label, shape, dtype, device)


def time_peer(label: str, open_it: Callable[[], Peer], cases: Sequence[Case]) -> list[dict[str, float | None]]:
    """Microseconds of each case, `LABEL_us` of the products alone and `LABEL_ffn_us` of the FFN; None if it fails."""
    peer = attempt(f"{label}: making layers", open_it)
    found: list[dict[str, float | None]] = []
    for case in cases:
        times: list[float | None] = [None, None]
        where = f"{label} at {case.tokens} tokens, {case.routing}"
        calls = attempt(where, lambda case=case: peer.calls(case)) if peer else None
        if calls:
            times = [attempt(where, lambda each=each: graph_time(each)) for each in calls]
        found.append({f"{label}_us": times[0], f"{label}_ffn_us": times[1]})
    return found
