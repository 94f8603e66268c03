"""How the prefill kernels cut their work, and which way is the fastest for so many tokens.

The number of columns (tokens) of a wgmma is part of the instruction, so a kernel is compiled for one width of its work
items and multiplies all columns of each, filled or not: there are several kernels, and the mean number of tokens an
expert says which fits. Short items are bound by the decoding of weights, and want more warps; long ones by the tensor
cores, and want all registers for sums.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_TILES = 4  # of a unit
SLACK = 1024  # bytes; the kernels put their shared memory on a boundary of that
_SHARED = 227 << 10  # bytes of shared memory that a block can have
_MAX_STAGES = 8
_GROUP_THREADS = 128


@dataclass(frozen=True)
class Config:
    """How a block of `multiply` is made.

    Attributes:
        width: the most tokens of a work item; sums of more would not fit the registers.
        turns: pairs of consumer warpgroups, which take the stages in turns. With two, twice as many warps hide each
            other's latencies, and half as many registers are left for the sums of each.
        registers: a thread of the producers and of the consumers; together what all threads start with.
    """

    width: int
    turns: int
    registers: tuple[int, int]

    @property
    def threads(self) -> int:
        return (1 + 2 * self.turns) * _GROUP_THREADS

    def ring(self, bits: int, halves: int) -> tuple[int, int]:
        """Stages of the ring in shared memory, as many as fit, and the bytes that a block takes."""
        stage = self.width * 128 + ROW_TILES * (bits * 512 + halves * 256) + 16
        sums = self.width * 512 if self.turns == 2 else 0
        rest = 2 * (self.width * (128 + 8) + sums) + 4 * self.width + 192 + 16
        stages = min(_MAX_STAGES, (_SHARED - SLACK - rest) // stage)
        stages -= stages % self.turns
        return stages, stages * stage + rest

    def macros(self, bits: int, halves: int, b16: bool, activation: int) -> dict[str, int]:
        """What a module is compiled with."""
        stages, shared = self.ring(bits, halves)
        return {
            "MILO_BF16": int(b16), "MILO_BITS": bits, "MILO_HALVES": halves, "MILO_ACTIVATION": activation,
            "MILO_WIDTH": self.width, "MILO_TURNS": self.turns,
            "MILO_STAGES": stages, "MILO_SHARED": shared,
            "MILO_PRODUCER_REGISTERS": self.registers[0], "MILO_CONSUMER_REGISTERS": self.registers[1],
        }  # fmt: skip

    @property
    def stage_clocks(self) -> int:
        """About what a stage takes: decoding, or the products of all columns. By arithmetic, not fitted to times."""
        return 650 if self.turns == 2 else max(900, 8 * self.width + 150)


CONFIGS = (
    *(Config(width, 2, (32, 112)) for width in (48, 64)),
    *(Config(width, 1, (56, 224)) for width in (96, 112, 128, 144, 160)),
)
_MOST_IN_TURNS = {1: 64, 2: 48}  # columns that fit the registers, by `halves`
_SIXTHS = (-1.38, -0.67, -0.21, 0.21, 0.67, 1.38)  # medians of the sixths of a normal distribution


def choose(tokens: int, choices: int, experts: int, halves: int = 1) -> Config:
    """The fastest configuration for a router that gives every expert as many tokens as the next, but for chance.

    Args:
        tokens: rows of the activations.
        choices: experts a token.
        experts: all that the router chooses from.
        halves: groups within a tile's 64 in-features; two take the registers that 64 columns in turns would need.
    """
    mean = tokens * choices / experts
    spread = mean**0.5 if experts > 1 else 0.0

    def clocks(config: Config) -> float:
        items = sum(-(-max(1.0, mean + d * spread) // config.width) for d in _SIXTHS)
        return items * config.stage_clocks

    return min((c for c in CONFIGS if c.turns == 1 or mean <= c.width <= _MOST_IN_TURNS[halves]), key=clocks)


def choose_for_linear(tokens: int, row_tiles: int, processors: int, halves: int = 1) -> Config:
    """The configuration with which a plain matrix keeps all processors busy for the shortest time."""
    groups = -(-row_tiles // ROW_TILES)

    def clocks(config: Config) -> int:
        units = -(-tokens // config.width) * groups
        return -(-units // processors) * config.stage_clocks

    return min((c for c in CONFIGS if c.turns == 1 or c.width <= _MOST_IN_TURNS[halves]), key=clocks)
