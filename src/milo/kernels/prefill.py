"""Launching `cuda/prefill.cu`: an MoE FFN or a linear for many tokens an expert, on GPUs with wgmma (sm_90)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from milo.kernels import decode, nvrtc
from milo.kernels.cutting import SINGLE
from milo.kernels.launching import CHOICE_DTYPES, Workspace, address, all_at_once, matrices, routing
from milo.kernels.layout import TILE, PackedMatrix
from milo.kernels.packed_reference import ACTIVATIONS
from milo.kernels.parameters import Matrix, Routing
from milo.kernels.prefill_config import CONFIGS, MAX_V_SPLITS, ROW_TILES, SLACK, THREADS, Config, Load, choose

# Tokens an expert, from which on these kernels are faster than decode's: of many experts, and of few, whose units are
# too few to hide each other's beginnings (docs/log.md, 2026-11-25 · narrow items).
MIN_MEAN_TOKENS, _MIN_MEAN_OF_FEW, _FEW = 10, 17, 16
# Row tiles times decode's turns: what takes it as long as one wave of units takes here (docs/log.md, likewise).
_LINEAR_WORK = 500
_MAX_TOKENS = 4096  # of one set of launches; more are done in turns, which bounds the workspace
_MAX_PAIRS = 32768
_SORT_THREADS, _COMBINE_THREADS = 1024, 256
_V_TILES = 2  # row tiles of V in one of its units
_MIN_V_STAGES = 8  # tiles along K of a part of V x
_RECORD_BYTES = 64


def supports(device: torch.device, dtype: torch.dtype, experts: int = 1, topk: int = 1) -> tuple[bool, str]:
    """Whether these kernels take such activations on this device, and if not, why."""
    fits, reason = decode.supports(device, dtype, experts, topk)
    if fits and torch.cuda.get_device_capability(device) != (9, 0):
        return False, "the kernels for many tokens need sm_90"
    return fits, reason


def prefers(tokens: int, topk: int, experts: int) -> bool:
    """Whether so many tokens are worth these kernels in an MoE FFN; `experts`: all that the router chooses from."""
    least = _MIN_MEAN_OF_FEW if experts <= _FEW else MIN_MEAN_TOKENS
    return tokens * topk >= least * experts


def prefers_linear(tokens: int, row_tiles: int, matrices: int) -> bool:
    """Whether a linear is worth these kernels, whose blocks walk over all of K one unit after the other.

    Args:
        tokens: rows of x.
        row_tiles: of all matrices together.
        matrices: that are stacked, each of which would have launches of its own here.
    """
    return -(-tokens // SINGLE[-1].tokens) * row_tiles >= _LINEAR_WORK * matrices


class Preparation(ctypes.Structure):
    """As `cuda/prepare.cuh` declares it."""

    _fields_ = (
        [("routing", Routing)]
        + [(n, ctypes.c_void_p) for n in ("choice_weights", "x", "operand", "first_table", "second_table", "items",
                                          "item_count", "order", "weights", "to_clear")]
        + [(n, ctypes.c_int) for n in ("clear_count", "tokens", "in_features", "planes", "k_tiles",
                                       "width", "choice_weight_type")]
    )  # fmt: skip


class Product(ctypes.Structure):
    """`Params` of `cuda/prefill.cuh`."""

    _fields_ = (
        [("weights", Matrix), ("v", Matrix)]
        + [(n, ctypes.c_void_p) for n in ("u_codes", "u_scales", "x", "out", "items", "item_count", "order",
                                          "choice_weights", "bias", "t_partial", "t", "v_arrived", "v_done")]
        + [(n, ctypes.c_int) for n in ("pitch", "pitch_out", "gather", "parts", "row_tiles", "rows", "groups",
                                       "v_groups", "v_splits", "t_stride", "places", "second", "early")]
    )  # fmt: skip


class Combination(ctypes.Structure):
    """As `cuda/prepare.cuh` declares it."""

    _fields_ = (
        [("routing", Routing)]
        + [(n, ctypes.c_void_p) for n in ("partial", "out")]
        + [(n, ctypes.c_int) for n in ("tokens", "topk", "rows")]
    )  # fmt: skip


class _Kernels:
    def __init__(self, config: Config, bits: int, halves: int, b16: bool, activation: int, device: int) -> None:
        module = nvrtc.Module("prefill.cu", config.macros(bits, halves, b16, activation), device, own=True)
        self.multiply = module.kernel("multiply", config.ring(bits, halves)[1] + SLACK)
        self.prepare = module.kernel("prepare", _sort_bytes(_MAX_PAIRS))
        self.combine = module.kernel("combine", 0)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernels(config: Config, bits: int, halves: int, b16: bool, activation: int, device: int) -> _Kernels:
    return _Kernels(config, bits, halves, b16, activation, device)


def prepare(weight: PackedMatrix, dtype: torch.dtype, activation: str = "silu") -> None:
    """Compile and load what any call with this matrix may need; nothing where these kernels do not run.

    Args:
        weight: on the device.
        dtype: float16 or bfloat16.
        activation: of the experts' gate; a linear goes by `silu`.

    Raises:
        KernelError: a kernel does not compile or load.
    """
    device = weight.codes.device
    if supports(device, dtype)[0]:
        kind = ACTIVATIONS.index(activation)
        _prepared(weight.bits, weight.halves, dtype == torch.bfloat16, kind, device.index)


@cache
def _prepared(bits: int, halves: int, b16: bool, activation: int, device: int) -> None:
    def compile_and_load(config: Config) -> None:
        with torch.cuda.device(device):
            _kernels(config, bits, halves, b16, activation, device)

    all_at_once(compile_and_load, CONFIGS)


def _sort_bytes(pairs: int) -> int:
    return SLACK + 4 * (2 * _SORT_THREADS + 2 * _SORT_THREADS // 32) + 2 * pairs


def linear(
    x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, config: Config | None = None
) -> torch.Tensor:
    """`x · Ŵᵀ + bias`: `[T, K]` to `[T, N]`. Two launches for every 4096 tokens."""
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):  # a model may lie on several
        for first in range(0, x.shape[0], _MAX_TOKENS):
            rows = slice(first, first + _MAX_TOKENS)
            _Call(x[rows], out[rows], None, None, None, (weight,), 0, config).linear(weight, bias)
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
    """The MoE FFN `[T, H]` to `[T, H]`: four launches for every 4096 tokens."""
    out = torch.empty(x.shape[0], down.out_features, dtype=x.dtype, device=x.device)
    turn = max(1, min(_MAX_TOKENS, _MAX_PAIRS // topk_ids.shape[1]))
    kind = ACTIVATIONS.index(activation)
    with torch.cuda.device(x.device):
        for first in range(0, x.shape[0], turn):
            rows = slice(first, first + turn)
            call = _Call(
                x[rows], out[rows], topk_ids[rows], topk_weights[rows], expert_map, (gate_up, down), kind, config
            )
            call.moe_ffn(gate_up, down)
    return out


class _Call:
    """One set of launches and its workspace."""

    def __init__(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        matrices: tuple[PackedMatrix, ...],
        activation: int,
        config: Config | None,
    ) -> None:
        self.x, self.out, self.ids, self.weights, self.activation = x, out, ids, weights, activation
        self.tokens, self.experts = x.shape[0], matrices[0].codes.shape[0]
        self.topk = 1 if ids is None else ids.shape[1]
        self.pairs = self.tokens * self.topk
        self.routing = routing(ids, expert_map, self.pairs, self.experts)
        everywhere = self.experts if expert_map is None else expert_map.shape[0]
        loads = tuple(Load(m.codes.shape[1], m.codes.shape[2]) for m in matrices)
        processors = _processors(x.device)
        self.config = config or choose(self.tokens, self.topk, everywhere, self.experts, loads, processors)
        self.width = self.config.width
        self.slots = processors * self.config.blocks  # blocks that run at a time
        self.kernels = self._of(matrices[0])

    def moe_ffn(self, gate_up: PackedMatrix, down: PackedMatrix) -> None:
        assert self.ids is not None
        assert self.weights is not None
        both = (gate_up, down)
        counters = [self._counters(m) for m in both]
        work = self._workspace(both, hidden=self.pairs * down.codes.shape[2] * TILE * 2,
                               partial=self.pairs * down.out_features * 2)  # fmt: skip
        self._prepare(gate_up, work, sum(counters), down)
        product = self._product(gate_up, work, work["counters"])
        product.x, product.out, product.pitch_out = work["operand"], work["hidden"], down.codes.shape[2] * TILE
        product.gather = self.topk
        self._multiply(gate_up, product)

        product = self._product(down, work, work["counters"] + 4 * counters[0])
        product.x, product.out, product.pitch_out = work["hidden"], work["partial"], down.out_features
        product.choice_weights, product.second, product.early = work["weights"], 1, 1
        self._multiply(down, product)

        rows = down.out_features
        last = Combination(self.routing, work["partial"], self.out.data_ptr(), self.tokens, self.topk, rows)
        blocks = -(-self.tokens * rows // (8 * _COMBINE_THREADS))
        self.kernels.combine(blocks, _COMBINE_THREADS, last, early=True)

    def linear(self, weight: PackedMatrix, bias: torch.Tensor | None) -> None:
        work = self._workspace((weight,))
        self._prepare(weight, work, self._counters(weight))
        product = self._product(weight, work, work["counters"])
        product.x, product.out, product.pitch_out = work["operand"], self.out.data_ptr(), weight.out_features
        product.order, product.bias = None, address(bias)
        self._multiply(weight, product)

    @property
    def _items(self) -> int:
        """The most work items that there can be."""
        if self.ids is None:
            return -(-self.tokens // self.width)
        return min(self.pairs, self.experts) + self.pairs // self.width

    def _counters(self, weight: PackedMatrix) -> int:
        """Those of V: an item's, and two for each group of V's row tiles."""
        return self._items * (2 * _v_groups(weight) + 1)

    def _workspace(self, weights: tuple[PackedMatrix, ...], **more: int) -> Workspace:
        t_stride = max(TILE * m.v_row_tiles for m in weights)
        splits = max(self._v_splits(m) for m in weights)
        return Workspace(
            self.x.device,
            operand=self.tokens * weights[0].codes.shape[2] * TILE * 2,
            items=self._items * _RECORD_BYTES,
            item_count=4,
            order=self.pairs * 4,
            weights=self.pairs * 4,
            counters=sum(map(self._counters, weights)) * 4,
            t_partial=splits * self.pairs * t_stride * 4,
            t=self.pairs * t_stride * 2,
            **more,
        )

    def _prepare(self, first: PackedMatrix, work: Workspace, counters: int, second: PackedMatrix | None = None) -> None:
        k_tiles = first.codes.shape[2]
        params = Preparation(self.routing)
        params.x, params.operand = self.x.data_ptr(), work["operand"]
        params.first_table, params.second_table = first.table.data_ptr(), address(second.table if second else None)
        for name in ("items", "item_count", "order", "weights"):
            setattr(params, name, work[name])
        params.to_clear, params.clear_count = work["counters"], counters
        params.tokens, params.k_tiles = self.tokens, k_tiles
        params.in_features, params.planes = first.in_features, first.planes
        params.width = self.width
        if self.weights is not None:
            params.choice_weights = self.weights.data_ptr()
            params.choice_weight_type = CHOICE_DTYPES.index(self.weights.dtype)
        sorting, shared = (1, 0) if self.ids is None else (self.experts, _sort_bytes(self.pairs))
        blocks = min(2 * _processors(self.x.device), sorting + -(-self.tokens * k_tiles * 8 // _SORT_THREADS))
        self.kernels.prepare(blocks, _SORT_THREADS, params, shared_bytes=shared)

    def _product(self, weight: PackedMatrix, work: Workspace, counters: int) -> Product:
        row_tiles, k_tiles = weight.codes.shape[1:3]
        product = Product(*matrices(weight))
        product.u_codes, product.u_scales = weight.u_codes.data_ptr(), weight.u_scales.data_ptr()
        for name in ("items", "item_count", "order", "t_partial", "t"):
            setattr(product, name, work[name])
        product.v_done, product.v_arrived = counters, counters + 4 * self._items
        product.pitch, product.parts, product.row_tiles = k_tiles * TILE, weight.parts, row_tiles
        product.rows, product.groups = weight.out_features, -(-row_tiles // ROW_TILES)
        product.v_groups, product.v_splits = _v_groups(weight), self._v_splits(weight)
        product.t_stride, product.places = TILE * weight.v_row_tiles, self.pairs
        return product

    def _multiply(self, weight: PackedMatrix, product: Product) -> None:
        kernels = self._of(weight)
        units = self._items * (product.groups + product.v_groups * product.v_splits)
        kernels.multiply(min(units, self.slots), THREADS, product, early=True)

    def _v_splits(self, weight: PackedMatrix) -> int:
        """Parts of K in which `V x` is computed: enough units for all blocks, but not too short ones."""
        groups = _v_groups(weight)
        if not groups:
            return 1
        if self.ids is None:
            items = self._items
        else:
            items = min(self.pairs, self.experts) * -(-self.pairs // (self.experts * self.width))
        parts = min(self.slots // (items * groups), weight.codes.shape[2] // _MIN_V_STAGES)
        return max(1, min(MAX_V_SPLITS, parts))

    def _of(self, weight: PackedMatrix) -> _Kernels:
        b16 = self.x.dtype == torch.bfloat16
        return _kernels(self.config, weight.bits, weight.halves, b16, self.activation, self.x.device.index)


def _v_groups(weight: PackedMatrix) -> int:
    return -(-weight.v_row_tiles // _V_TILES)
