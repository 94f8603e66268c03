"""What one compressed matrix is: its parameters, its tensors, its bytes.

A weight matrix `W` of `N` out-features and `K` in-features is kept as

    W  ≈  scale · (code − zero)  +  U · V

with `code` an integer of `bits` bits, one `scale` and one real-valued `zero` for every `group_size` consecutive
in-features of a row, and a compensator of rank `r` whose factors are stored as `Uᵀ [r, N]` and `V [r, K]`, packed
along their long axis so that any rank is dense. `docs/format.md` is the normative text; this module is the only
place in the code that knows names, dtypes and shapes, so that bytes are computed before anything is compressed.

A *stack* is a 3-D parameter of `E` experts that the source checkpoint stores as one tensor. Its tensors carry a
leading `E`, and its factors are concatenated along the rank: `[Σ rₑ, N]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from milo.errors import PlanError
from milo.format.codes import byte_count, word_count

# Wider codes are split into planes that share a scale, so that kernels for 3 and 4 bits read them too:
# code = high · 2**plane_bits + low.
_PLANES = MappingProxyType({6: 3, 8: 4})
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
META_BITS = (6, 8, 16)
FACTOR_BITS: Mapping[str, int] = MappingProxyType({"int3": 3, "int8": 8, "fp16": 16})
FACTOR_GROUP = 64  # consecutive elements of a factor row that share one signed fp16 scale

# Every safetensors dtype of whole bytes: tensors that are not compressed are copied whatever they are.
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
    | {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on disk: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of the whole for a scalar."""
        return DTYPE_BYTES[self.dtype] * prod(self.shape[1:])


@dataclass(frozen=True)
class Encoding:
    """How the numbers of a matrix are written; the same for every member of a group of matrices.

    Attributes:
        bits: width of a weight code, one of `BITS`.
        group_size: in-features that share a scale and a zero, one of `GROUP_SIZES`. The last group of a row may be
            shorter.
        scale_bits: 16 (fp16 scales), or 6 or 8 (fractions of one fp16 super-scale a row, the row's largest scale).
        zero_bits: 16 (fp16, any real value), or 6 or 8 (codes in equal steps over `[0, 2**bits - 1]`).
        factor: dtype of the compensator's factors, a key of `FACTOR_BITS`.

    Raises:
        PlanError: for a value outside those sets.
    """

    bits: int = 3
    group_size: int = 64
    scale_bits: int = 16
    zero_bits: int = 16
    factor: str = "int3"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("bits", BITS),
            ("group_size", GROUP_SIZES),
            ("scale_bits", META_BITS),
            ("zero_bits", META_BITS),
            ("factor", tuple(FACTOR_BITS)),
        ):
            value = getattr(self, field)
            if value not in allowed or type(value) is not type(allowed[0]):
                raise PlanError(f"{field} = {value!r} is not supported; choose one of {', '.join(map(str, allowed))}")

    @property
    def plane_bits(self) -> int:
        """Bits of one stored plane: `bits`, or half of it for 6 and 8."""
        return _PLANES.get(self.bits, self.bits)

    @property
    def planes(self) -> int:
        return self.bits // self.plane_bits

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def scale_step(self) -> float:
        """Distance between two scales that `scale_bits < 16` can express, as a fraction of the super-scale."""
        return 1 / (2**self.scale_bits - 1)

    @property
    def zero_step(self) -> float:
        """Distance between two zeros that `zero_bits < 16` can express, in codes."""
        return self.max_code / (2**self.zero_bits - 1)

    def groups(self, in_features: int) -> int:
        """Groups a row of `in_features` weights."""
        return -(-in_features // self.group_size)

    def weight_tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Tensors of the codes and their metadata for a matrix `[N, K]` or a stack `[E, N, K]`."""
        *lead, k = shape
        groups = self.groups(k)
        words = TensorSpec("I32", (*lead, word_count(k, self.plane_bits)))
        tensors = {"weight_packed": words}
        if self.planes == 2:
            tensors["weight_packed_hi"] = words
        tensors["weight_scale"] = _meta_spec(self.scale_bits, lead, groups)
        if self.scale_bits < 16:
            tensors["weight_super_scale"] = TensorSpec("F16", tuple(lead))
        tensors["weight_zero"] = _meta_spec(self.zero_bits, lead, groups)
        return tensors

    def factor_tensors(self, out_features: int, in_features: int, rank: int) -> dict[str, TensorSpec]:
        """Tensors of a compensator of `rank` (for a stack: the sum of its members' ranks); none for rank 0."""
        if rank == 0:
            return {}
        tensors = {}
        for name, length in (("lowrank_u", out_features), ("lowrank_v", in_features)):
            bits = FACTOR_BITS[self.factor]
            if bits == 16:
                tensors[name] = TensorSpec("F16", (rank, length))
            else:
                tensors[name] = TensorSpec("I32", (rank, word_count(length, bits)))
                tensors[name + "_scale"] = TensorSpec("F16", (rank, -(-length // FACTOR_GROUP)))
        return tensors

    def tensors(self, shape: tuple[int, ...], rank: int) -> dict[str, TensorSpec]:
        """Every tensor of one matrix `[N, K]` or one stack `[E, N, K]` with (summed) rank `rank`."""
        return {**self.weight_tensors(shape), **self.factor_tensors(shape[-2], shape[-1], rank)}

    def nbytes(self, shape: tuple[int, ...], rank: int) -> int:
        """Exact bytes of one matrix or stack on disk, container headers excluded."""
        return sum(spec.nbytes for spec in self.tensors(shape, rank).values())


def _meta_spec(bits: int, lead: list[int], groups: int) -> TensorSpec:
    if bits == 16:
        return TensorSpec("F16", (*lead, groups))
    return TensorSpec("U8", (*lead, byte_count(groups, bits)))
