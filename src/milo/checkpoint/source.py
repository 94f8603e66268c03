"""A source checkpoint: safetensors shards read one tensor at a time.

Opening reads headers only, and checks everything that headers can tell (truncated or missing shards, an index that
names absent tensors), so that a broken download is found before hours of work. FP8 weights with block scales
(DeepSeek-V3: `X.weight` in float8_e4m3 beside `X.weight_scale_inv`, one float32 for each 128 × 128 block) are
multiplied out as they are read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from milo.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_MAX_HEADER = 100_000_000  # bytes; the safetensors limit
_SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor; `begin` and `end` are file offsets in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Checkpoint:
    """A folder with `config.json` and safetensors shards.

    Args:
        folder: local path.

    Raises:
        CheckpointError: no such folder, no config, no safetensors, or shards and index that do not fit together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; give a local model folder or a hub model name")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            for info in read_header(file):
                if info.name in self.tensors:
                    raise CheckpointError(
                        f"tensor {info.name} stands in both {self.tensors[info.name].file.name} and {file.name}; "
                        "remove the stale shard"
                    )
                self.tensors[info.name] = info
        self._check_index()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json`."""
        return load_json(self.folder / "config.json")

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype; FP8 with block scales comes as bfloat16.

        Raises:
            CheckpointError: the tensor is absent, or its block scales do not fit it.
        """
        info = self._info(name)
        try:
            with safe_open(info.file, framework="pt") as shard:
                tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {info.file}: {error}") from error
        scales = self.block_scales(name)
        return tensor if scales is None else multiply_out(tensor, scales, self.scale_block)

    def read_into(self, name: str, out: torch.Tensor, first_row: int = 0) -> None:
        """Stored bytes of a tensor, or of some of its rows, straight from the file into `out`.

        Nothing is mapped and nothing is allocated, so `out` may be pinned memory and a reader thread can fill it
        while other threads compute (the read holds no Python lock).

        Args:
            name: the tensor.
            out: contiguous CPU tensor of the stored dtype; `[rows, ...]` unless it is the whole tensor.
            first_row: index of the first row wanted.

        Raises:
            CheckpointError: the tensor is absent, or the file is unreadable or shorter than its header promised.
            ValueError: `out` asks for other bytes than the tensor has, which would be a bug.
        """
        info = self._info(name)
        row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
        begin = info.begin + first_row * row
        if out.dtype != TORCH_DTYPES[info.dtype] or begin + out.nbytes > info.end:
            raise ValueError(f"{name}: {out.dtype} {tuple(out.shape)} is not what {info} holds")
        left = out.view(-1).view(torch.uint8).numpy().data
        try:
            with info.file.open("rb", buffering=0) as stream:
                stream.seek(begin)
                while left:
                    got = stream.readinto(left)
                    if not got:
                        raise OSError("the file ends before the tensor does")
                    left = left[got:]
        except OSError as error:
            raise CheckpointError(f"cannot read {name} from {info.file}: {error}") from error

    def is_block_scale(self, name: str) -> bool:
        """Whether `name` holds the block scales of an FP8 weight, which `read` of that weight consumes."""
        owner = self.tensors.get(name.removesuffix(_SCALE_SUFFIX))
        return name.endswith(_SCALE_SUFFIX) and owner is not None and owner.dtype == "F8_E4M3"

    def block_scales(self, name: str) -> torch.Tensor | None:
        """Block scales of an FP8 weight, float32; None for a tensor of any other dtype.

        Raises:
            CheckpointError: they are missing or do not fit the weight.
        """
        info = self._info(name)
        if info.dtype != "F8_E4M3":
            return None
        scale_name = name + _SCALE_SUFFIX
        if scale_name not in self.tensors:
            raise CheckpointError(f"{name} is FP8 but {scale_name} is missing, so its values are unknown")
        scales = self.read(scale_name).float()
        expected = tuple(-(-n // b) for n, b in zip(info.shape[-2:], self.scale_block, strict=True))
        if tuple(scales.shape[-2:]) != expected:
            raise CheckpointError(
                f"{scale_name} has shape {tuple(scales.shape)}, but {name} {info.shape} needs {expected} "
                f"for blocks of {list(self.scale_block)}"
            )
        return scales

    @property
    def scale_block(self) -> Sequence[int]:
        """Rows and columns of an FP8 weight that share a block scale."""
        return (self.config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}") from None

    def _files(self) -> list[Path]:
        if (self.folder / INDEX).exists():
            names = sorted(set(self._weight_map.values()))
            missing = [n for n in names if not (self.folder / n).exists()]
            if missing:
                raise CheckpointError(f"{self.folder} lacks {', '.join(missing[:3])}; finish the download")
            return [self.folder / n for n in names]
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt")):
            raise CheckpointError(
                f"{self.folder} has PyTorch pickles only; load it with transformers and save_pretrained it to get "
                "safetensors"
            )
        raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}; is it a model folder?")

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        weight_map = load_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map; download it again")
        return weight_map

    def _check_index(self) -> None:
        if not (self.folder / INDEX).exists():
            return
        for name, file in self._weight_map.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(f"{INDEX} says {file} holds {name}, but it does not; download it again")


def multiply_out(weight: torch.Tensor, scales: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """FP8 `weight [..., N, K]` times its block `scales`, as bfloat16 on the device of the weight."""
    for dim, (size, step) in enumerate(zip(weight.shape[-2:], block, strict=True), start=-2):
        scales = scales.repeat_interleave(step, dim=dim).narrow(dim, 0, size)
    return (weight.float() * scales).to(torch.bfloat16)


def read_header(file: Path) -> Iterator[TensorInfo]:
    """Tensors of one safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is truncated or not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header, start = _parse_header(stream, file, size)
    end = start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            first, last = entry["data_offsets"]
            info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, start + first, start + last)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} has a damaged header entry for {name}") from error
        end = max(end, info.end)
        yield info
    if end != size:
        raise CheckpointError(f"{file} is {size} bytes long but its header describes {end}: truncated or damaged")


def read_metadata(file: Path) -> dict[str, str]:
    """The free-form `__metadata__` of a safetensors file."""
    with file.open("rb") as stream:
        header, _ = _parse_header(stream, file, file.stat().st_size)
    return header.get("__metadata__") or {}


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `CheckpointError` that names the file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return loaded


def _parse_header(stream: BinaryIO, file: Path, size: int) -> tuple[dict[str, Any], int]:
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
    if length is None or length > _MAX_HEADER or 8 + length > size:
        raise CheckpointError(f"{file} is truncated or not a safetensors file")
    try:
        header = json.loads(stream.read(length))
    except ValueError as error:
        raise CheckpointError(f"{file} has an unreadable header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has an unreadable header: no JSON object")
    return header, 8 + length
