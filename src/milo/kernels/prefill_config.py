"""How the prefill kernels cut their work, and which way is the fastest for so many tokens.

The number of columns (tokens) of a wgmma is part of the instruction, so a kernel is compiled for one width of its work
items and multiplies all columns of each, filled or not: there are several kernels, and the mean number of tokens an
expert says which fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, erfc

from milo.kernels.cutting import RESERVED, SHARED

ROW_TILES = 4  # of a unit
THREADS = 384
MAX_V_SPLITS = 16  # parts of K in which `V x` is computed
SLACK = 1024  # bytes; the kernels put their shared memory on a boundary of that
_MAX_STAGES = 8
_LAG = 2  # stages between the two warpgroups of consumers
# A thread's, of producers and consumers, by the blocks an SM: together the 168 or 80 that each of 384 starts with.
_REGISTERS = {1: (40, 232), 2: (32, 104)}


@dataclass(frozen=True)
class Config:
    """How a block of `multiply` is made.

    Attributes:
        width: the most tokens of a work item; sums of more would not fit the registers.
        blocks: an SM.
    """

    width: int
    blocks: int = 1

    def ring(self, bits: int, halves: int) -> tuple[int, int]:
        """Stages of the ring in shared memory, as many as fit, and the bytes that a block takes."""
        stage = self.width * 128 + ROW_TILES * (bits * 512 + halves * 256) + 16
        rest = 2 * self.width * (128 + 8) + 4 * self.width + 192 + 16
        stages = min(_MAX_STAGES, (SHARED // self.blocks - RESERVED - SLACK - rest) // stage)
        return stages, stages * stage + rest

    def macros(self, bits: int, halves: int, b16: bool, activation: int) -> dict[str, int]:
        """What a module is compiled with."""
        stages, shared = self.ring(bits, halves)
        producer, consumer = _REGISTERS[self.blocks]
        return {
            "MILO_BF16": int(b16), "MILO_BITS": bits, "MILO_HALVES": halves, "MILO_ACTIVATION": activation,
            "MILO_WIDTH": self.width, "MILO_STAGES": stages, "MILO_SHARED": shared,
            "MILO_LAG": _LAG, "MILO_V_SPLITS": MAX_V_SPLITS,
            "MILO_BLOCKS": self.blocks, "MILO_PRODUCER_REGISTERS": producer, "MILO_CONSUMER_REGISTERS": consumer,
        }  # fmt: skip


# Two blocks of narrow items are faster where units are many, one where they are few.
CONFIGS = (
    *(Config(width, 2) for width in (32, 48, 64)),
    *(Config(width) for width in (48, 64, 80, 96, 112, 128, 144, 160)),
)
_SIXTHS = (-1.38, -0.67, -0.21, 0.21, 0.67, 1.38)  # medians of the sixths of a normal distribution
# Microseconds on an H100 by the blocks an SM: of a stage, and of each of its columns; of a unit's start and end, and of
# each of its columns; of the rest. Fitted to 189 times at rank 32 (docs/log.md, 2026-11-25 · narrow items).
_COSTS = {1: (0.374, 0.0031, 3.72, 0.0252, 5.4), 2: (0.632, 0.0062, 3.17, 0.0761, 27.9)}


@dataclass(frozen=True)
class Load:
    """One product of a layer, as its cost depends on it.

    Attributes:
        row_tiles: of one expert's matrix.
        k_tiles: tiles along its in-features.
    """

    row_tiles: int
    k_tiles: int


@lru_cache(maxsize=4096)  # the layers of a model ask the same
def choose(tokens: int, choices: int, everywhere: int, here: int, loads: tuple[Load, ...], processors: int) -> Config:
    """The configuration that is expected to be the fastest for a router with no favourites.

    A processor takes one unit after another, so what counts is how many the busiest one has: of few and long units a
    single item more may cost a whole wave, which is why wide items can be faster than ones that fit the tokens better.

    Args:
        tokens: rows of the activations.
        choices: experts a token.
        everywhere: experts that the router chooses from, 1 for a plain matrix.
        here: those that are on this device.
        loads: the products.
        processors: SMs.
    """
    mean = tokens * choices / everywhere

    def expected(config: Config) -> float:
        stage, stage_column, once, once_column, rest = _COSTS[config.blocks]
        average, deviation = _items(mean, mean**0.5 if everywhere > 1 else 0.0, config.width)
        total = rest * len(_SIXTHS)
        for load in loads:
            groups = -(-load.row_tiles // ROW_TILES)
            unit = load.k_tiles * (stage + stage_column * config.width) + once + once_column * config.width
            for d in _SIXTHS:
                items = round(here * average + d * here**0.5 * deviation)
                total += unit * ceil(items * groups / (processors * config.blocks))
        return total

    return min(CONFIGS, key=expected)


def _items(mean: float, spread: float, width: int) -> tuple[float, float]:
    """Mean and standard deviation of an expert's items, for a normal number of tokens."""
    if not spread:
        return float(ceil(mean / width)), 0.0
    first = second = 0.0
    for j in range(ceil((mean + 4 * spread) / width)):
        more = erfc((j * width + 0.5 - mean) / (spread * 2**0.5)) / 2  # the probability of more than j items
        first, second = first + more, second + (2 * j + 1) * more
    return first, max(0.0, second - first * first) ** 0.5
