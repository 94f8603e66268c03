"""Launching `cuda/moe.cu`: an MoE FFN or a linear for few tokens an expert, correct for any number of them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch

from milo.kernels import nvrtc
from milo.kernels.layout import TILE, PackedMatrix
from milo.kernels.packed_reference import ACTIVATIONS

MAX_EXPERTS = 1024  # local experts; the blocks' routing scratch is sized by it
MAX_PAIRS = 4096  # (token, choice) pairs a launch; more tokens are done in turns
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Config:
    """How a launch is cut: n8 tiles of tokens a work item, warps a block, ring stages a warp, blocks an SM."""

    token_tiles: int
    warps: int
    stages: int
    blocks: int

    @property
    def tokens(self) -> int:
        return 8 * self.token_tiles

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def main_bytes(self, bits: int, halves: int) -> int:
        """Shared memory of the rings, which the reduction over warps reuses."""
        ring = self.warps * self.stages * (bits * 512 + halves * 256 + self.token_tiles * 1024)
        return max(ring, self.warps * self.tokens * 68 * 4)


CONFIGS = (Config(1, 8, 4, 2), Config(2, 8, 3, 2), Config(4, 8, 3, 1))


def choose(tokens: int, pairs: int, experts: int) -> Config:
    """Tiles wide enough for most experts in one pass over their weights, and no wider."""
    mean = pairs / experts
    wanted = 1 if tokens <= 8 or mean <= 4 else 2 if tokens <= 16 or mean <= 9 else 4
    return next(c for c in CONFIGS if c.token_tiles >= wanted)


class _Routing(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("ids", "expert_map")]
        + [(n, ctypes.c_int) for n in ("ids_are_64", "map_length", "pairs", "experts")]
    )  # fmt: skip


class _Matrix(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("codes", "meta")]
        + [(n, ctypes.c_int) for n in ("ktiles", "groups", "meta_shift")]
    )  # fmt: skip


class _Compensator(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("u_codes", "u_scales", "table", "t")]
        + [(n, ctypes.c_int) for n in ("t_stride", "t_splits")]
    )  # fmt: skip


class _Params(ctypes.Structure):
    """`Params` of `cuda/moe.cu`, field by field."""

    _fields_ = (
        [("routing", _Routing), ("weights", _Matrix), ("v", _Matrix), ("compensator", _Compensator)]
        + [(n, ctypes.c_void_p) for n in ("x", "out", "partial", "choice_weights", "bias", "arrivals", "v_done",
                                          "to_clear")]
        + [(n, ctypes.c_int) for n in ("clear_count", "tokens", "topk", "items", "in_features", "row_tiles", "rows",
                                       "row_divisor", "splits", "v_row_tiles", "v_blocks", "activation",
                                       "choice_weight_type")]
    )  # fmt: skip


class _Kernels:
    def __init__(self, config: Config, bits: int, halves: int, b16: bool, device: int) -> None:
        macros = {
            "MILO_BF16": int(b16), "MILO_BITS": bits, "MILO_HALVES": halves, "MILO_NT": config.token_tiles,
            "MILO_WARPS": config.warps, "MILO_STAGES": config.stages, "MILO_BLOCKS": config.blocks,
            "MILO_EXPERTS": MAX_EXPERTS, "MILO_PAIRS": MAX_PAIRS,
        }  # fmt: skip
        module = nvrtc.Module("moe.cu", macros, device)
        scratch = (config.tokens + config.warps + MAX_EXPERTS) * 4 + MAX_PAIRS * 2
        shared = config.main_bytes(bits, halves) + scratch
        self.factors, self.gate_up, self.down = (module.kernel(n, shared) for n in ("factors", "gate_up", "down"))
        self.blocks = config.blocks * torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=None)
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


def linear(
    x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, config: Config | None = None
) -> torch.Tensor:
    """`x · Ŵᵀ + bias`: `[T, K]` to `[T, N]`. At most two launches (and a memset) for every 4096 tokens."""
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], MAX_PAIRS):
        rows = slice(first, first + MAX_PAIRS)
        _Call(x[rows], out[rows], None, None, None, 1, config).linear(weight, bias)
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
    """The MoE FFN `[T, H]` to `[T, H]`: three launches, two where no expert of `gate_up` has a compensator."""
    out = torch.empty(x.shape[0], down.out_features, dtype=x.dtype, device=x.device)
    turn = max(1, MAX_PAIRS // topk_ids.shape[1])
    for first in range(0, x.shape[0], turn):
        rows = slice(first, first + turn)
        call = _Call(x[rows], out[rows], topk_ids[rows], topk_weights[rows], expert_map, gate_up.codes.shape[0], config)
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
        experts: int,
        config: Config | None,
    ) -> None:
        self.x, self.out = x, out
        self.tokens = x.shape[0]
        self.topk = 1 if ids is None else ids.shape[1]
        self.pairs = self.tokens * self.topk
        self.config = config or choose(self.tokens, self.pairs, experts)
        a_tile = self.config.tokens
        if ids is None:
            self.items = -(-self.tokens // a_tile)
        else:
            self.items = min(self.pairs, experts) + (self.pairs // a_tile if self.pairs > a_tile else 0)
        self.routing = _Routing(
            _address(ids), _address(expert_map), int(ids is not None and ids.dtype == torch.int64),
            0 if expert_map is None else expert_map.shape[0], self.pairs, experts,
        )  # fmt: skip
        self.weights = weights

    def moe_ffn(self, gate_up: PackedMatrix, down: PackedMatrix, activation: int) -> None:
        kernels = self._of(gate_up)
        hidden = gate_up.out_features
        row_tiles = -(-down.out_features // TILE)
        splits = _splits(self.items * row_tiles, down.codes.shape[2], self.config, kernels.blocks)
        counters = row_tiles + self.items
        t_up, t_down = TILE * gate_up.v_row_tiles, TILE * down.v_row_tiles
        workspace = _Workspace(
            self.x.device,
            h=self.pairs * hidden * 2,
            counters=counters * 4,
            t_up=self.pairs * t_up * 4,
            t_down=splits * self.pairs * t_down * 4,
            partial=self.pairs * splits * row_tiles * TILE * 4,
        )
        first = self._params(gate_up, self.x.data_ptr(), workspace["h"], self.topk, workspace["t_up"], 1)
        first.to_clear, first.clear_count, first.activation = workspace["counters"], counters, activation
        if gate_up.v_row_tiles:
            kernels.factors(self.items * gate_up.v_row_tiles, self.config.threads, first)
        kernels.gate_up(self.items * first.row_tiles, self.config.threads, first, early=gate_up.v_row_tiles > 0)

        kernels = self._of(down)
        last = self._params(down, workspace["h"], self.out.data_ptr(), 1, workspace["t_down"], splits)
        last.partial, last.arrivals = workspace["partial"], workspace["counters"]
        last.v_done = workspace["counters"] + 4 * row_tiles
        last.v_blocks = self.items * down.v_row_tiles * splits
        last.choice_weights, last.choice_weight_type = _address(self.weights), _DTYPES.index(self.weights.dtype)
        kernels.down(last.v_blocks + self.items * row_tiles * splits, self.config.threads, last, early=True)

    def linear(self, weight: PackedMatrix, bias: torch.Tensor | None) -> None:
        kernels = self._of(weight)
        row_tiles, k_tiles = weight.codes.shape[1:3]
        splits = _splits(self.items * row_tiles, k_tiles, self.config, kernels.blocks)
        t_splits = _splits(self.items * max(weight.v_row_tiles, 1), k_tiles, self.config, kernels.blocks)
        workspace = _Workspace(
            self.x.device,
            counters=row_tiles * 4,
            t=t_splits * self.pairs * TILE * weight.v_row_tiles * 4,
            partial=self.pairs * splits * row_tiles * TILE * 4,
        )
        params = self._params(weight, self.x.data_ptr(), self.out.data_ptr(), 1, workspace["t"], splits)
        params.compensator.t_splits = t_splits
        params.partial, params.arrivals, params.bias = workspace["partial"], workspace["counters"], _address(bias)
        if weight.v_row_tiles:
            params.to_clear, params.clear_count = workspace["counters"], row_tiles
            kernels.factors(self.items * weight.v_row_tiles * t_splits, self.config.threads, params)
        else:
            workspace.clear("counters", row_tiles * 4)
        launch = self.items * row_tiles * splits
        kernels.down(launch, self.config.threads, params, early=weight.v_row_tiles > 0)

    def _of(self, weight: PackedMatrix) -> _Kernels:
        b16 = self.x.dtype == torch.bfloat16
        return _kernels(self.config, weight.bits, weight.halves, b16, self.x.device.index)

    def _params(self, weight: PackedMatrix, x: int, out: int, row_divisor: int, t: int, splits: int) -> _Params:
        row_tiles, k_tiles = weight.codes.shape[1:3]
        shift = 1 if weight.group_size == 128 else 0
        params = _Params(
            routing=self.routing,
            weights=_Matrix(weight.codes.data_ptr(), weight.meta.data_ptr(), k_tiles, weight.meta.shape[2], shift),
            v=_Matrix(weight.v_codes.data_ptr(), weight.v_meta.data_ptr(), k_tiles, k_tiles, 0),
            compensator=_Compensator(
                weight.u_codes.data_ptr(), weight.u_scales.data_ptr(), weight.table.data_ptr(), t,
                TILE * weight.v_row_tiles, splits,
            ),
        )  # fmt: skip
        params.x, params.out = x, out
        params.tokens, params.topk, params.items = self.tokens, self.topk, self.items
        params.in_features, params.rows, params.row_tiles = weight.in_features, weight.out_features, row_tiles
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

    def clear(self, name: str, size: int) -> None:
        self._memory[self._offsets[name] : self._offsets[name] + size].zero_()


def _splits(blocks: int, k_tiles: int, config: Config, slots: int) -> int:
    """Into how many parts K is cut over blocks: the fewest waves of work, a block's fixed cost counted as 4 tiles."""

    def cost(splits: int) -> float:
        waves = -(-blocks * splits // slots)
        return waves * (-(-k_tiles // (config.warps * splits)) + 4)

    return min(range(1, 9), key=lambda splits: (cost(splits), splits))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
