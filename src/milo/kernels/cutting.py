"""Cutting an MoE FFN into launches: how many tokens a work item takes, and how a product spreads over blocks.

All of it is decided on the host from shapes alone, so nothing waits for the device and a graph can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from milo.kernels.layout import TILE

ADDED_TOKENS = 8  # up to so many (and so many choices) a block of `down` adds up a row tile's items by itself
ADDED_PAIRS = 128
MAX_EXPERTS = 1024  # local experts; the blocks' routing scratch is sized by these
MAX_V_SPLITS = 4  # runs of K in which V x is computed
_QUEUE = 128 * 32 + 96  # bytes of a block's queue of parts, and what goes with it
_WIDE_QUEUE = 64 * 32 + 128
_WIDE_V_TILES = 32  # tiles along K of a part of V, at least
_WIDE_LEAST = 6  # ticks that are worth a block
SHARED = 228 << 10  # bytes of shared memory that an SM of sm_90 has
RESERVED = 1024  # of these a block takes beyond its own


@dataclass(frozen=True)
class Cut:
    """How a product is spread over blocks.

    Attributes:
        blocks: of the launch.
        quanta: runs of K that a unit, a work item's row tile, is cut into (`cuda/units.cuh`).
        v_cost: what a part of V counts as when the work is dealt out: quanta, or ticks (`cuda/wide.cuh`).
    """

    blocks: int
    quanta: int
    v_cost: int


@dataclass(frozen=True)
class Config:
    """How a launch is cut whose warps split the in-features of a row tile (`cuda/moe.cu`).

    Attributes:
        token_tiles: n8 tiles of tokens a work item.
        warps: of a block.
        stages: of a warp's ring.
        blocks: an SM.
        pairs: (token, choice) pairs a launch; more are done in turns.
    """

    token_tiles: int
    warps: int
    stages: int
    blocks: int
    pairs: int = 1024

    source: ClassVar[str] = "moe.cu"

    @property
    def tokens(self) -> int:
        """Of a work item."""
        return 8 * self.token_tiles

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def table_bytes(self) -> int:
        """Of the routing table in shared memory."""
        return 4 * self.pairs + 8 * (min(self.pairs, MAX_EXPERTS) + self.pairs // self.tokens)

    def shared_bytes(self, bits: int, halves: int) -> int:
        """Shared memory of a block: rings, reduction, routing table, queue of parts, a row tile's sums."""
        ring = self.warps * self.stages * (bits * 512 + halves * 256 + self.token_tiles * 1024)
        reduction = (2 if self.token_tiles == 1 else 1) * self.warps * self.tokens * 256
        return ring + reduction + self.table_bytes + 4 * ADDED_PAIRS + 256 * ADDED_TOKENS + _QUEUE

    def carry_bytes(self, slots: int) -> int:
        """Memory for sums that cross from block to block."""
        return slots * self.tokens * TILE * 4

    def v_splits(self, k_tiles: int) -> int:
        """Runs of K that V x is cut into: few, since each is a sum to add, but short."""
        return max(1, min(MAX_V_SPLITS, k_tiles // self.warps))

    def cut(self, items: float, row_tiles: int, k_tiles: int, v_tiles: float, slots: int) -> Cut:
        """Spread a product over blocks.

        Args:
            items: work items, expected.
            row_tiles: of the matrix.
            k_tiles: tiles along K.
            v_tiles: row tiles of V an item, expected.
            slots: blocks that run at a time.
        """
        units = items * row_tiles
        finest = max(1, k_tiles // self.warps)  # so that a quantum has a tile for every warp
        splits = self.v_splits(k_tiles)
        parts = math.ceil(items * v_tiles) * splits
        if units > slots:  # equal stretches, wherever they begin and end
            return Cut(slots, finest, max(1, round(finest / splits)))
        # Few units: whole ones, or equal pieces where that is worth handing sums over. V has blocks of its own, if it
        # can, each of which counts as a piece.
        few, chain = math.ceil(units), -(-k_tiles // self.warps)

        def latency(pieces: int) -> float:
            """Microseconds for a warp's tiles one after the other, and to add up pieces (H100, docs/log.md)."""
            blocks = few * pieces + parts
            tiles = chain / pieces + (chain / splits if parts and blocks > slots else 0)  # V goes ahead
            alone = blocks <= slots // self.blocks  # on its SM
            return tiles * 0.45 * (1 if alone else 1.8) + (1.2 + 0.3 * pieces if pieces > 1 else 0)

        quanta = min(range(1, max(1, min(finest, slots // few)) + 1), key=latency)
        blocks = few * quanta
        apart = blocks + parts <= slots
        return Cut(blocks + parts if apart else blocks, quanta, 1 if apart else 0)


@dataclass(frozen=True)
class Wide(Config):
    """9 to 32 tokens a work item, whose activations a block's warps share (`cuda/wide.cu`)."""

    source: ClassVar[str] = "wide.cu"

    def shared_bytes(self, bits: int, halves: int) -> int:
        """Shared memory of a block: rings, four stages of activations and of their sums, routing table, parts."""
        rings = self.warps * (self.stages * bits * 512 + 8 * halves * 256)
        activations = 16 * (self.token_tiles * 1024 + halves * 32 * (self.token_tiles | 1))
        return rings + activations + self.table_bytes + _WIDE_QUEUE

    def carry_bytes(self, slots: int) -> int:
        """As much again serves warps that share a row tile."""
        return 2 * slots * self.warps * self.tokens * TILE * 4

    def v_splits(self, k_tiles: int) -> int:
        return max(1, min(MAX_V_SPLITS, k_tiles // _WIDE_V_TILES))

    def _ticks(self, row_tiles: float, k_tiles: int) -> int:
        """What a group of row tiles takes: warps share a row tile if there are fewer than half as many as them."""
        ways = 4 if 4 * row_tiles <= self.warps else 2 if 2 * row_tiles <= self.warps else 1
        return -(-k_tiles // ways)

    def cut(self, items: float, row_tiles: int, k_tiles: int, v_tiles: float, slots: int) -> Cut:
        groups, rest = divmod(row_tiles, self.warps)
        ticks = items * (groups * k_tiles + (self._ticks(rest, k_tiles) if rest else 0))
        splits = self.v_splits(k_tiles)
        v_cost = self._ticks(min(v_tiles, self.warps), -(-k_tiles // splits))
        ticks += items * math.ceil(v_tiles / self.warps) * splits * v_cost
        return Cut(max(1, min(slots, math.ceil(ticks / _WIDE_LEAST))), 0, v_cost)


# The fastest somewhere; 16, 48 and 64 tokens an item, and other warps, were not (docs/log.md).
CONFIGS: tuple[Config, ...] = (Config(1, 8, 3, 2, 512), Wide(3, 12, 4, 1, 4096), Wide(4, 8, 4, 1, 4096))
# For compensators of high rank. A wide warp adds all of `U t` for its row tile by itself, at rank 1,024 in 64 steps one
# after the other; here the warps of a block share them.
SPLIT: tuple[Config, ...] = (CONFIGS[0], Config(2, 8, 2, 2), Config(3, 12, 2, 1), Config(4, 8, 3, 1))
HIGH_RANK = 4  # more row tiles of V than these
# For a single matrix, which is read from L2 where it is met again: 24 and 32 tokens an item were slower at rank 512,
# and 8 tokens an item (whose blocks add up by themselves) from four tokens on.
SINGLE: tuple[Config, ...] = (CONFIGS[0], SPLIT[1])
_SINGLE_FEW = 3  # tokens, the most for the first of these


def fit(config: Config, bits: int, halves: int, shared: int) -> Config | None:
    """`config` with as many ring stages as `shared` bytes an SM allow, one block an SM if it must be; None if none."""
    for blocks in (config.blocks, 1):
        for stages in range(config.stages, 1, -1):
            fitted = replace(config, stages=stages, blocks=blocks)
            if fitted.shared_bytes(bits, halves) <= shared // blocks - RESERVED:
                return fitted
    return None


def choose(tokens: int, pairs: int, experts: int, configs: Sequence[Config] = CONFIGS) -> Config:
    """Tiles wide enough for four experts of five in one pass over their weights, and no wider."""
    mean = pairs / experts
    for config in configs:
        spread = 0.8 * mean**0.5  # of a balanced router's counts; measured: a second pass costs less than empty columns
        if tokens <= config.tokens or mean + spread <= config.tokens:
            return config
    return configs[-1]


def choose_single(tokens: int, configs: Sequence[Config]) -> Config:
    """One of `SINGLE`, or of what is left of it on a device."""
    return configs[0] if tokens <= _SINGLE_FEW else configs[-1]
