"""Reading a compressed folder: checked against its own plan before a single weight is used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from milo.checkpoint.inventory import Kind
from milo.checkpoint.source import Checkpoint, load_json, read_metadata
from milo.checkpoint.writer import EVALUATION, UNFINISHED
from milo.errors import CheckpointError, FormatError
from milo.format.matrix import TensorSpec
from milo.kernels.reference import reconstruct
from milo.plan.plan import Plan, Row

QUANT_METHOD = "milo"
FORMAT_VERSION = 1
DIGEST_KEY = "milo_plan_sha256"
REPORT = "milo_report.json"


def plan_from_config(quantization_config: Mapping[str, Any], where: str) -> Plan:
    """The plan of a `quantization_config`, after checking method, version and digest.

    Args:
        quantization_config: as in `config.json`.
        where: named in errors.

    Raises:
        FormatError: not MiLo's, a newer format version, or a plan that was altered.
    """
    method = quantization_config.get("quant_method")
    if method != QUANT_METHOD:
        raise FormatError(f"{where} is not compressed with MiLo (quant_method: {method})")
    version = quantization_config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FormatError(
            f"{where} has format version {version}, newer than this MiLo reads ({FORMAT_VERSION}); "
            "upgrade with `pip install -U milo-moe`"
        )
    plan = Plan.from_json(quantization_config.get("plan") or {})
    if quantization_config.get("plan_sha256") != plan.digest:
        raise FormatError(f"the plan of {where} does not match its plan_sha256: config.json was edited or damaged")
    return plan


class CompressedCheckpoint(Checkpoint):
    """A folder that MiLo wrote.

    Raises:
        CheckpointError: unfinished, truncated, or tensors missing.
        FormatError: foreign or newer format, a tampered plan, tensors that are not what the plan says.
    """

    def __init__(self, folder: str | Path) -> None:
        if (Path(folder) / UNFINISHED).exists():
            raise CheckpointError(f"{folder} is an unfinished compression; run the same `milo quantize` again")
        config = load_json(Path(folder) / "config.json") if Path(folder).is_dir() else {}
        if config:
            self.plan = plan_from_config(config.get("quantization_config") or {}, str(folder))
        super().__init__(folder)
        self._check_tensors()

    @cached_property
    def base_model(self) -> str | None:
        """The source this folder was made from, as it was named then."""
        return self.config["quantization_config"].get("base_model")

    @cached_property
    def report(self) -> dict[str, Any]:
        """`milo_report.json`."""
        return load_json(self.folder / REPORT)

    @property
    def has_report(self) -> bool:
        """Whether there is one: a folder that another program saved again has lost it."""
        return (self.folder / REPORT).exists()

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """`milo_eval.json`, or None where nothing was measured and saved."""
        path = self.folder / EVALUATION
        return load_json(path) if path.exists() else None

    def matrix(self, row: Row, member: int) -> dict[str, torch.Tensor]:
        """The stored tensors of one matrix, by suffix (`weight_packed`, ...), cut out of a stack if need be."""
        if row.kind is not Kind.STACK:
            prefix = row.matrices()[member] + "."
            return {suffix: self.read(prefix + suffix) for suffix in row.encoding.tensors(row.shape, row.ranks[member])}
        first = sum(row.ranks[:member])
        cut = {}
        for name in row.tensors():
            suffix, tensor = name.removeprefix(row.name + "."), self.read(name)
            factor = suffix.startswith("lowrank")
            cut[suffix] = tensor[first : first + row.ranks[member]] if factor else tensor[member]
        return cut

    def weight(self, row: Row, member: int) -> torch.Tensor:
        """The reconstructed matrix `Ŵ`, float32 `[N, K]`."""
        return reconstruct(self.matrix(row, member), row.encoding, row.shape)

    def _check_tensors(self) -> None:
        for file in {info.file for info in self.tensors.values()}:
            digest = read_metadata(file).get(DIGEST_KEY)
            if digest is not None and digest != self.plan.digest:
                raise FormatError(f"{file} belongs to another plan than {self.folder}/config.json")
        for name, spec in self.plan.tensors():
            info = self.tensors.get(name)
            if info is None:
                raise FormatError(f"{self.folder} lacks {name}, which its plan promises")
            if TensorSpec(info.dtype, info.shape) != spec:
                raise FormatError(f"{name} in {info.file} is {info.dtype} {info.shape}, but the plan says {spec}")
