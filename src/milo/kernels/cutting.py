"""Cutting an MoE FFN into launches: how many tokens a work item takes, and how a product spreads over warps and blocks.

All of it is decided on the host from shapes alone, so nothing waits for the device and a graph can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_PAIRS = 1024  # (token, choice) pairs a launch; more tokens are done in turns
_RESERVED = 1024  # bytes of shared memory that a block takes beyond its own
_FIXED_TILES = 3  # the end of a unit of work, in tiles of one warp


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

    def shared_bytes(self, bits: int, halves: int) -> int:
        """Shared memory of a block: the warps' rings, the reduction, the routing table."""
        ring = self.warps * self.stages * (bits * 512 + halves * 256 + self.token_tiles * 1024)
        items = MAX_PAIRS + MAX_PAIRS // self.tokens
        return ring + self.warps * self.tokens * 68 * 4 + 2 * MAX_PAIRS + 4 * items + 8


CONFIGS = (Config(1, 8, 4, 2), Config(2, 8, 2, 2), Config(3, 12, 2, 1), Config(4, 8, 3, 1))


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


def cut(
    active: float, row_tiles: int, k_tiles: int, v_tiles: float, config: Config, slots: int, splits: bool
) -> tuple[int, int]:
    """How a product is spread over warps and blocks.

    Args:
        active: work items with work in them, expected.
        row_tiles: of one item.
        k_tiles: tiles along K.
        v_tiles: row tiles of `V` in the same launch, which all warps of a block share.
        config: of the launch.
        slots: blocks that run at a time.
        splits: whether blocks may share a row tile.

    Returns:
        Warps of a block that share a row tile, and units that do: the least rounds of units times work a warp, where
        a unit's fixed cost counts as `_FIXED_TILES`.
    """

    def cost(choice: tuple[int, int]) -> float:
        k_warps, parts = choice
        units = active * -(-row_tiles * k_warps // config.warps) * parts + v_tiles * k_warps * parts / config.warps
        work = -(-k_tiles // (k_warps * parts)) + _FIXED_TILES + (parts - 1)
        return math.ceil(units / slots - 0.02) * work

    divisors = [w for w in range(1, config.warps + 1) if config.warps % w == 0]
    choices = [(w, s) for w in divisors for s in (range(1, 9) if splits else (1,)) if s == 1 or w == config.warps]
    return min(choices, key=cost)
