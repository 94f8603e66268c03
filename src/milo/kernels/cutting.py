"""Cutting an MoE FFN into launches: how many tokens a work item takes, and how a product spreads over blocks.

All of it is decided on the host from shapes alone, so nothing waits for the device and a graph can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

ADDED_TOKENS = 8  # up to so many (and so many choices) a block of `down` adds up a row tile's items by itself
ADDED_PAIRS = 128
MAX_V_SPLITS = 4  # runs of K in which V x is computed
_QUEUE = 128 * 32 + 96  # bytes of a block's queue of parts, and what goes with it
_RESERVED = 1024  # bytes of shared memory that a block takes beyond its own


@dataclass(frozen=True)
class Config:
    """How a launch is cut.

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

    @property
    def tokens(self) -> int:
        """Of a work item."""
        return 8 * self.token_tiles

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_bytes(self, bits: int, halves: int) -> int:
        """Shared memory of a block: rings, reduction, routing table, queue of parts, a row tile's sums."""
        ring = self.warps * self.stages * (bits * 512 + halves * 256 + self.token_tiles * 1024)
        table = 4 * self.pairs + 8 * (self.pairs + self.pairs // self.tokens)
        buffers = 2 if self.token_tiles == 1 else 1
        return ring + buffers * self.warps * self.tokens * 256 + table + 4 * ADDED_PAIRS + 256 * ADDED_TOKENS + _QUEUE


CONFIGS = (Config(1, 8, 3, 2, 512), Config(2, 8, 2, 2), Config(3, 12, 2, 1), Config(4, 8, 3, 1))


def fit(config: Config, bits: int, halves: int, shared: int) -> Config | None:
    """`config` with as many ring stages as `shared` bytes an SM allow, one block an SM if it must be; None if none."""
    for blocks in (config.blocks, 1):
        for stages in range(config.stages, 1, -1):
            fitted = replace(config, stages=stages, blocks=blocks)
            if fitted.shared_bytes(bits, halves) <= shared // blocks - _RESERVED:
                return fitted
    return None


def choose(tokens: int, pairs: int, experts: int, configs: Sequence[Config] = CONFIGS) -> Config:
    """Tiles wide enough for most experts in one pass over their weights, and no wider."""
    mean = pairs / experts
    for config in configs:
        spread = 2 * mean**0.5  # two standard deviations of a balanced router's counts
        if tokens <= config.tokens or mean + spread <= config.tokens:
            return config
    return configs[-1]


@dataclass(frozen=True)
class Cut:
    """How a product is spread over blocks (`cuda/units.cuh`).

    Attributes:
        blocks: of the launch.
        quanta: runs of K that a unit, a work item's row tile, is cut into.
        v_cost: quanta that a part of V counts as when the work is dealt out.
    """

    blocks: int
    quanta: int
    v_cost: int


def v_splits(k_tiles: int, warps: int) -> int:
    """Runs of K that V x is cut into: few, since each is a sum to add, but short."""
    return max(1, min(MAX_V_SPLITS, k_tiles // warps))


def cut(units: float, k_tiles: int, v_tiles: float, warps: int, slots: int) -> Cut:
    """Spread a product over blocks.

    Args:
        units: row tiles of all work items, expected.
        k_tiles: tiles along K.
        v_tiles: row tiles of V of all work items, expected.
        warps: of a block, which share a unit's K.
        slots: blocks that run at a time.
    """
    finest = max(1, k_tiles // warps)  # so that a quantum has a tile for every warp
    splits = v_splits(k_tiles, warps)
    parts = math.ceil(v_tiles) * splits
    if units > slots:  # equal stretches, wherever they begin and end
        return Cut(slots, finest, max(1, round(finest / splits)))
    # Few units: whole ones, or equal pieces, so that few sums cross from block to block.
    quanta = min(finest, slots // math.ceil(units))
    blocks = math.ceil(units) * quanta
    apart = blocks + parts <= slots and quanta == 1  # V has blocks of its own
    return Cut(blocks + parts if apart else blocks, quanta, 1 if apart else 0)
