"""Launching `cuda/moe.cu`: an MoE FFN or a linear for few tokens an expert, correct for any number of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from milo.kernels import nvrtc
from milo.kernels.cutting import CONFIGS, MAX_PAIRS, Config, choose, cut, fit
from milo.kernels.layout import TILE, PackedMatrix
from milo.kernels.packed_reference import ACTIVATIONS
from milo.kernels.parameters import Compensator, Matrix, Params, Routing

MAX_EXPERTS = 1024  # local experts; the blocks' routing scratch is sized by these
_SHARED = 228 << 10  # bytes of shared memory an SM of sm_90 has
_MAX_T_SPLITS = 4  # parts of K in which V x is computed
_COMBINE_BYTES = 1 << 15  # of partial sums that one block adds up itself; more get a launch of their own
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Kernels:
    def __init__(self, config: Config, bits: int, halves: int, b16: bool, device: int) -> None:
        macros = {
            "MILO_BF16": int(b16), "MILO_BITS": bits, "MILO_HALVES": halves, "MILO_NT": config.token_tiles,
            "MILO_WARPS": config.warps, "MILO_STAGES": config.stages, "MILO_BLOCKS": config.blocks,
            "MILO_EXPERTS": MAX_EXPERTS, "MILO_PAIRS": MAX_PAIRS,
        }  # fmt: skip
        module = nvrtc.Module("moe.cu", macros, device)
        shared = config.shared_bytes(bits, halves)
        self.gate_up, self.down = module.kernel("gate_up", shared), module.kernel("down", shared)
        self.clear, self.combine = module.kernel("clear", 0), module.kernel("combine", 0)
        self.blocks = config.blocks * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _fitting(configs: tuple[Config, ...], bits: int, halves: int, device: int) -> tuple[Config, ...]:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_multiprocessor", _SHARED)
    return tuple(fitted for c in configs if (fitted := fit(c, bits, halves, shared)))


@cache
def _kernels(config: Config, bits: int, halves: int, b16: bool, device: int) -> _Kernels:
    return _Kernels(config, bits, halves, b16, device)


def supports(device: torch.device, dtype: torch.dtype, experts: int = 1, topk: int = 1) -> tuple[bool, str]:
    """Whether the kernels take these activations on this device, and if not, why."""
    if device.type != "cuda":
        return False, f"{device.type} tensors are computed by the PyTorch reference"
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"activations are float16 or bfloat16, not {dtype}"
    if experts > MAX_EXPERTS or topk > MAX_PAIRS:
        return False, f"at most {MAX_EXPERTS} local experts and {MAX_PAIRS} choices a token"
    return nvrtc.available()


def prepare(weight: PackedMatrix, dtype: torch.dtype) -> None:
    """Compile and load what any call with this matrix and activations of this dtype may launch.

    Args:
        weight: on the device.
        dtype: float16 or bfloat16.

    Raises:
        KernelError: a kernel does not compile or load.
    """
    _prepared(weight.bits, weight.halves, dtype == torch.bfloat16, weight.codes.device.index)


@cache
def _prepared(bits: int, halves: int, b16: bool, device: int) -> None:
    def compile_and_load(config: Config) -> None:
        with torch.cuda.device(device):
            _kernels(config, bits, halves, b16, device)

    configs = _fitting(CONFIGS, bits, halves, device)
    with ThreadPoolExecutor(len(configs), "nvrtc") as pool:  # the compiler runs without Python's lock
        list(pool.map(compile_and_load, configs))


def linear(
    x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, config: Config | None = None
) -> torch.Tensor:
    """`x · Ŵᵀ + bias`: `[T, K]` to `[T, N]`. At most three launches for every `MAX_PAIRS` tokens."""
    x = x.repeat(1, weight.planes) if weight.planes > 1 else x  # see milo.kernels.planes
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):  # a model may lie on several
        for first in range(0, x.shape[0], MAX_PAIRS):
            rows = slice(first, first + MAX_PAIRS)
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
    """The MoE FFN `[T, H]` to `[T, H]`: two to four launches for every `MAX_PAIRS` choices."""
    out = torch.empty(x.shape[0], down.out_features, dtype=x.dtype, device=x.device)
    turn = max(1, MAX_PAIRS // topk_ids.shape[1])
    with torch.cuda.device(x.device):
        for first in range(0, x.shape[0], turn):
            rows = slice(first, first + turn)
            call = _Call(x[rows], out[rows], topk_ids[rows], topk_weights[rows], expert_map, gate_up, config)
            call.moe_ffn(gate_up, down, ACTIVATIONS.index(activation))
    return out


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
        config: Config | None,
    ) -> None:
        experts = first.codes.shape[0]
        self.x, self.out = x, out
        self.tokens = x.shape[0]
        self.topk = 1 if ids is None else ids.shape[1]
        self.pairs = self.tokens * self.topk
        configs = _fitting((config,) if config else CONFIGS, first.bits, first.halves, x.device.index)
        self.config = choose(self.tokens, self.pairs, experts, configs)
        a_tile = self.config.tokens
        if ids is None:
            self.items = -(-self.tokens // a_tile)
        else:
            self.items = min(self.pairs, experts) + (self.pairs // a_tile if self.pairs > a_tile else 0)
        spread = experts * (1 - max(0.0, 1 - self.topk / experts) ** self.tokens)  # experts that balanced routing meets
        self.active = self.items if ids is None else min(self.items, spread)
        self.routing = Routing(
            _address(ids), _address(expert_map), int(ids is not None and ids.dtype == torch.int64),
            0 if expert_map is None else expert_map.shape[0], self.pairs, experts,
        )  # fmt: skip
        self.weights = weights

    def moe_ffn(self, gate_up: PackedMatrix, down: PackedMatrix, activation: int) -> None:
        kernels, threads = self._of(gate_up), self.config.threads
        row_tiles = down.codes.shape[1]
        k_warps, splits = self._cut(down, kernels, True)
        counters = row_tiles + 2 * self.items  # arrivals at row tiles; finished V of the first and the second matrix
        workspace = _Workspace(
            self.x.device,
            h=self.pairs * gate_up.out_features * 2,
            counters=counters * 4,
            t_up=_MAX_T_SPLITS * self.pairs * TILE * gate_up.v_row_tiles * 4,
            t_down=_MAX_T_SPLITS * self.pairs * TILE * down.v_row_tiles * 4,
            partial=self.pairs * splits * row_tiles * TILE * 4,
        )
        first = self._params(gate_up, self.x.data_ptr(), workspace["h"], self.topk, workspace["t_up"], 1)
        first.activation = activation
        first.k_warps, _ = self._cut(gate_up, kernels, False)
        self._clear(kernels, first, workspace["counters"], counters)
        kernels.gate_up(self._blocks(kernels, first), threads, first, early=gate_up.v_row_tiles > 0)

        kernels = self._of(down)
        last = self._params(down, workspace["h"], self.out.data_ptr(), 1, workspace["t_down"], splits)
        last.partial, last.arrivals, last.k_warps = workspace["partial"], workspace["counters"], k_warps
        last.v_done = workspace["counters"] + 4 * (row_tiles + self.items)
        if self.weights is not None:
            last.choice_weights, last.choice_weight_type = self.weights.data_ptr(), _DTYPES.index(self.weights.dtype)
        self._down(kernels, last, early=True)

    def linear(self, weight: PackedMatrix, bias: torch.Tensor | None) -> None:
        kernels = self._of(weight)
        row_tiles = weight.codes.shape[1]
        k_warps, splits = self._cut(weight, kernels, True)
        counters = row_tiles + self.items
        workspace = _Workspace(
            self.x.device,
            counters=counters * 4,
            t=_MAX_T_SPLITS * self.pairs * TILE * weight.v_row_tiles * 4,
            partial=self.pairs * splits * row_tiles * TILE * 4,
        )
        params = self._params(weight, self.x.data_ptr(), self.out.data_ptr(), 1, workspace["t"], splits)
        params.partial, params.arrivals, params.bias = workspace["partial"], workspace["counters"], _address(bias)
        params.k_warps = k_warps
        params.v_done = workspace["counters"] + 4 * row_tiles
        params.to_clear, params.clear_count = workspace["counters"], counters
        kernels.clear(1, self.config.threads, params)
        self._down(kernels, params, early=True)

    def _cut(self, weight: PackedMatrix, kernels: _Kernels, splits: bool) -> tuple[int, int]:
        row_tiles, k_tiles = weight.codes.shape[1:3]
        v_tiles = self.active * weight.v_row_tiles
        return cut(self.active, row_tiles, k_tiles, v_tiles, self.config, kernels.blocks, splits)

    def _t_splits(self, k_tiles: int) -> int:
        return max(1, min(_MAX_T_SPLITS, k_tiles // (4 * self.config.warps)))

    def _clear(self, kernels: _Kernels, params: Params, counters: int, count: int) -> None:
        """Zero the counters: the first kernel does it where it needs none itself."""
        params.to_clear, params.clear_count = counters, count
        params.v_done = counters + 4 * (count - 2 * self.items)
        if params.v_row_tiles:
            kernels.clear(1, self.config.threads, params)

    def _down(self, kernels: _Kernels, params: Params, early: bool) -> None:
        threads = self.config.threads
        a_block = self.pairs * params.splits * TILE * 4 * (self.config.warps // params.k_warps)
        params.combine_later = a_block > _COMBINE_BYTES
        kernels.down(self._blocks(kernels, params), threads, params, early=early)
        if params.combine_later:
            turns = -(-self.tokens // (threads // 16))
            kernels.combine(params.row_tiles * turns, threads, params, early=True)

    def _blocks(self, kernels: _Kernels, params: Params) -> int:
        """As many blocks as run at a time, or fewer if there is less work."""
        params.block_row_tiles = self.config.warps // params.k_warps
        params.groups = -(-params.row_tiles // params.block_row_tiles)
        units = self.items * (params.groups * params.splits + params.v_row_tiles * params.compensator.t_splits)
        return min(kernels.blocks, units)

    def _of(self, weight: PackedMatrix) -> _Kernels:
        b16 = self.x.dtype == torch.bfloat16
        return _kernels(self.config, weight.bits, weight.halves, b16, self.x.device.index)

    def _params(self, weight: PackedMatrix, x: int, out: int, row_divisor: int, t: int, splits: int) -> Params:
        row_tiles, k_tiles = weight.codes.shape[1:3]
        shift = 1 if weight.group_size == 128 else 0
        params = Params(
            routing=self.routing,
            weights=Matrix(weight.codes.data_ptr(), weight.meta.data_ptr(), k_tiles, weight.meta.shape[2], shift),
            v=Matrix(weight.v_codes.data_ptr(), weight.v_meta.data_ptr(), k_tiles, k_tiles, 0),
            compensator=Compensator(
                weight.u_codes.data_ptr(), weight.u_scales.data_ptr(), weight.table.data_ptr(), t,
                TILE * weight.v_row_tiles, self._t_splits(k_tiles),
            ),
        )  # fmt: skip
        params.x, params.out = x, out
        params.tokens, params.topk = self.tokens, self.topk
        params.in_features, params.rows, params.row_tiles = weight.columns, weight.out_features, row_tiles
        params.row_divisor, params.splits, params.v_row_tiles = row_divisor, splits, weight.v_row_tiles
        return params


class _Workspace:
    """Buffers of one call, from one allocation of PyTorch's pool (freed in stream order when the call returns)."""

    def __init__(self, device: torch.device, **sizes: int) -> None:
        self._offsets: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            self._offsets[name] = total
            total += -(-size // 256) * 256
        self._memory = torch.empty(total, dtype=torch.uint8, device=device)

    def __getitem__(self, name: str) -> int:
        return self._memory.data_ptr() + self._offsets[name]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
