"""Launching `cuda/moe.cu` and `cuda/wide.cu`: an MoE FFN or a linear for few tokens an expert, correct for any."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch

from milo.kernels import nvrtc
from milo.kernels.cutting import (
    ADDED_PAIRS,
    ADDED_TOKENS,
    CONFIGS,
    HIGH_RANK,
    MAX_EXPERTS,
    SHARED,
    SINGLE,
    SPLIT,
    Config,
    choose,
    choose_single,
    fit,
)
from milo.kernels.launching import CHOICE_DTYPES, Workspace, address, all_at_once, matrices, routing
from milo.kernels.layout import TILE, PackedMatrix
from milo.kernels.packed_reference import ACTIVATIONS
from milo.kernels.parameters import Compensator, Params

MAX_CHOICES = min(config.pairs for config in CONFIGS)
_COUNTER_BYTES = 3 << 12  # of a launch's counters
_STREAMS = 64
_TURN = 16  # tokens a block of `combine`


class _Kernels:
    def __init__(self, config: Config, bits: int, halves: int, b16: bool, device: int) -> None:
        module = nvrtc.Module(config.source, macros(config, bits, halves, b16), device)
        shared = config.shared_bytes(bits, halves)
        self.gate_up, self.down = module.kernel("gate_up", shared), module.kernel("down", shared)
        self.combine = module.kernel("combine", 4 * config.pairs)
        self.slots = config.blocks * torch.cuda.get_device_properties(device).multi_processor_count


def macros(config: Config, bits: int, halves: int, b16: bool) -> dict[str, int]:
    """What the configuration's source is compiled with."""
    return {
        "MILO_BF16": int(b16), "MILO_BITS": bits, "MILO_HALVES": halves, "MILO_NT": config.token_tiles,
        "MILO_WARPS": config.warps, "MILO_STAGES": config.stages, "MILO_BLOCKS": config.blocks,
        "MILO_EXPERTS": MAX_EXPERTS, "MILO_PAIRS": config.pairs, "MILO_COUNTER_BYTES": _COUNTER_BYTES,
        "MILO_SHARED_BYTES": config.shared_bytes(bits, halves),
    }  # fmt: skip


@cache
def _fitting(configs: tuple[Config, ...], bits: int, halves: int, device: int) -> tuple[Config, ...]:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_multiprocessor", SHARED)
    return tuple(fitted for c in configs if (fitted := fit(c, bits, halves, shared)))


@cache
def _kernels(config: Config, bits: int, halves: int, b16: bool, device: int) -> _Kernels:
    return _Kernels(config, bits, halves, b16, device)


class _CounterPool:
    """Counters that are zero whenever no kernel runs: for gate_up, down and linear, apart for every stream.

    The kernels leave them zero (gate_up and down zero each other's), which saves the launch that would. Kernels on one
    stream run one after the other; two streams never share.
    """

    def __init__(self, device: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise nvrtc.KernelError("call the operator once before a graph is captured: it allocates its counters")
        size = (_STREAMS, 3, _COUNTER_BYTES)
        self._memory = torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))
        torch.cuda.synchronize(device)  # zero for whichever stream comes first
        self._numbers: dict[int, int] = {}

    def of(self, stream: int) -> tuple[int, int, int]:
        """Addresses for the kernels gate_up, down and linear."""
        number = self._numbers.setdefault(stream, len(self._numbers))
        if number >= _STREAMS:
            raise nvrtc.KernelError(f"MiLo's operators run on at most {_STREAMS} streams of a device in one process")
        gate_up, down, linear = (t.data_ptr() for t in self._memory[number])
        return gate_up, down, linear


@cache
def _counters(device: int) -> _CounterPool:
    return _CounterPool(device)


def supports(device: torch.device, dtype: torch.dtype, experts: int = 1, topk: int = 1) -> tuple[bool, str]:
    """Whether the kernels take these activations on this device, and if not, why."""
    if device.type != "cuda":
        return False, f"{device.type} tensors are computed by the PyTorch reference"
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"activations are float16 or bfloat16, not {dtype}"
    if experts > MAX_EXPERTS or topk > MAX_CHOICES:
        return False, f"at most {MAX_EXPERTS} local experts and {MAX_CHOICES} choices a token"
    return nvrtc.available()


def prepare(weight: PackedMatrix, dtype: torch.dtype) -> None:
    """Compile, load and allocate what any call with this matrix and activations of this dtype may need.

    Args:
        weight: on the device.
        dtype: float16 or bfloat16.

    Raises:
        KernelError: a kernel does not compile or load.
    """
    configs = SINGLE if weight.codes.shape[0] == 1 else tuple(dict.fromkeys(CONFIGS + SPLIT))
    _prepared(configs, weight.bits, weight.halves, dtype == torch.bfloat16, weight.codes.device.index)


@cache
def _prepared(configs: tuple[Config, ...], bits: int, halves: int, b16: bool, device: int) -> None:
    def compile_and_load(config: Config) -> None:
        with torch.cuda.device(device):
            _kernels(config, bits, halves, b16, device)

    all_at_once(compile_and_load, _fitting(configs, bits, halves, device))
    _counters(device)


def linear(
    x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, config: Config | None = None
) -> torch.Tensor:
    """`x · Ŵᵀ + bias`: `[T, K]` to `[T, N]`. One launch for up to 8 tokens, else two a turn."""
    x = x.repeat(1, weight.planes) if weight.planes > 1 else x  # see milo.kernels.planes
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    config = _config(x, x.shape[0], [weight], config)
    with torch.cuda.device(x.device):  # a model may lie on several
        for first in range(0, x.shape[0], config.pairs):
            rows = slice(first, first + config.pairs)
            _Call(x[rows], out[rows], None, None, None, weight, config).linear(weight, bias)
    return out


def moe_ffn(
    x: torch.Tensor,
    gate_up: PackedMatrix,
    down: PackedMatrix,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str,
    expert_map: torch.Tensor | None,
    config: Config | None = None,
) -> torch.Tensor:
    """The MoE FFN `[T, H]` to `[T, H]`: two launches for up to 8 tokens, else three a turn."""
    out = torch.empty(x.shape[0], down.out_features, dtype=x.dtype, device=x.device)
    config = _config(x, topk_ids.numel(), [gate_up, down], config)
    turn = config.pairs // topk_ids.shape[1]
    with torch.cuda.device(x.device):
        for first in range(0, x.shape[0], turn):
            rows = slice(first, first + turn)
            call = _Call(x[rows], out[rows], topk_ids[rows], topk_weights[rows], expert_map, gate_up, config)
            call.moe_ffn(gate_up, down, ACTIVATIONS.index(activation))
    return out


def _config(x: torch.Tensor, pairs: int, weights: Sequence[PackedMatrix], config: Config | None) -> Config:
    first = weights[0]
    experts = first.codes.shape[0]
    high = max(weight.v_row_tiles for weight in weights) > HIGH_RANK
    family = (config,) if config else SINGLE if experts == 1 else SPLIT if high else CONFIGS
    fitting = _fitting(family, first.bits, first.halves, x.device.index)
    return choose_single(x.shape[0], fitting) if experts == 1 else choose(x.shape[0], pairs, experts, fitting)


class _Call:
    """One set of launches: the cutting into work items and the workspace."""

    def __init__(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        first: PackedMatrix,
        config: Config,
    ) -> None:
        experts = first.codes.shape[0]
        self.x, self.out, self.config = x, out, config
        self.tokens = x.shape[0]
        self.topk = 1 if ids is None else ids.shape[1]
        self.pairs = self.tokens * self.topk
        if ids is None:
            self.items: float = -(-self.tokens // config.tokens)
        else:  # experts that balanced routing meets, and further passes over those that meet many tokens
            met = experts * (1 - max(0.0, 1 - self.topk / experts) ** self.tokens)
            self.items = min(self.pairs, met + max(0.0, self.pairs / config.tokens - met))
        self.add_items = self.tokens <= ADDED_TOKENS and self.pairs <= ADDED_PAIRS and config.token_tiles == 1
        self.routing = routing(ids, expert_map, self.pairs, experts)
        self.weights = weights
        self.stream = torch.cuda.current_stream().cuda_stream

    def moe_ffn(self, gate_up: PackedMatrix, down: PackedMatrix, activation: int) -> None:
        kernels, last_kernels = self._of(gate_up), self._of(down)
        workspace = Workspace(
            self.x.device,
            h=self.pairs * gate_up.out_features * 2,
            t_up=self._t_bytes(gate_up),
            t_down=self._t_bytes(down),
            partial=self._partial_bytes(down),
            carry=self.config.carry_bytes(max(kernels.slots, last_kernels.slots)),
        )
        counters, next_counters, _ = _counters(self.x.device.index).of(self.stream)
        first, blocks = self._params(gate_up, kernels.slots, self.x.data_ptr(), workspace, "t_up")
        first.out, first.row_divisor, first.activation = workspace["h"], self.topk, activation
        first.counters, first.others = counters, next_counters
        kernels.gate_up(blocks, self.config.threads, first)

        last, blocks = self._params(down, last_kernels.slots, workspace["h"], workspace, "t_down")
        last.counters, last.others = next_counters, counters
        if self.weights is not None:
            last.choice_weights = self.weights.data_ptr()
            last.choice_weight_type = CHOICE_DTYPES.index(self.weights.dtype)
        self._down(last_kernels, blocks, last, early=True)

    def linear(self, weight: PackedMatrix, bias: torch.Tensor | None) -> None:
        kernels = self._of(weight)
        workspace = Workspace(
            self.x.device,
            t=self._t_bytes(weight),
            partial=self._partial_bytes(weight),
            carry=self.config.carry_bytes(kernels.slots),
        )
        params, blocks = self._params(weight, kernels.slots, self.x.data_ptr(), workspace, "t")
        params.counters, params.bias = _counters(self.x.device.index).of(self.stream)[2], address(bias)
        self._down(kernels, blocks, params, early=False)

    def _t_bytes(self, weight: PackedMatrix) -> int:
        return self.config.v_splits(weight.codes.shape[2]) * self.pairs * TILE * weight.v_row_tiles * 4

    def _partial_bytes(self, weight: PackedMatrix) -> int:
        return 0 if self.add_items else self.pairs * weight.codes.shape[1] * TILE * 4

    def _down(self, kernels: _Kernels, blocks: int, params: Params, early: bool) -> None:
        params.out, params.row_divisor, params.add_items = self.out.data_ptr(), 1, int(self.add_items)
        kernels.down(blocks, self.config.threads, params, early=early)
        if not self.add_items:
            kernels.combine(params.row_tiles * -(-self.tokens // _TURN), 16 * _TURN, params, early=True)

    def _of(self, weight: PackedMatrix) -> _Kernels:
        b16 = self.x.dtype == torch.bfloat16
        return _kernels(self.config, weight.bits, weight.halves, b16, self.x.device.index)

    def _params(self, weight: PackedMatrix, slots: int, x: int, workspace: Workspace, t: str) -> tuple[Params, int]:
        """What both kernels are told, and how many blocks there are."""
        row_tiles, k_tiles = weight.codes.shape[1:3]
        experts = weight.codes.shape[0]
        spread = self.config.cut(self.items, row_tiles, k_tiles, weight.v_codes.shape[0] / experts, slots)
        params = Params(
            self.routing,
            *matrices(weight),
            Compensator(
                weight.u_codes.data_ptr(), weight.u_scales.data_ptr(), weight.table.data_ptr(), workspace[t],
                TILE * weight.v_row_tiles, self.config.v_splits(k_tiles), len(weight.stack),
            ),
        )  # fmt: skip
        for number, rows in enumerate(accumulate(out_features for out_features, _ in weight.stack)):
            params.compensator.ends[number] = -(-rows // TILE)
        params.x, params.partial, params.carry = x, workspace["partial"], workspace["carry"]
        params.tokens, params.topk, params.in_features = self.tokens, self.topk, weight.columns
        params.rows, params.row_tiles = weight.out_features, row_tiles
        params.quanta, params.v_cost = spread.quanta, spread.v_cost
        return params, spread.blocks
