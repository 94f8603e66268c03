"""The errors MiLo raises on purpose.

Each message names the file or tensor and says what to do. The command line prints them without a traceback;
anything else that escapes is a bug in MiLo.
"""

from __future__ import annotations


class MiloError(Exception):
    """Base of every error that MiLo raises on purpose."""


class CheckpointError(MiloError):
    """A source or compressed checkpoint is broken: truncated, incomplete, inconsistent or not a checkpoint."""


class UnsupportedModelError(MiloError):
    """The model's layout is not understood, so its experts would silently stay uncompressed."""


class PlanError(MiloError):
    """A recipe, rank policy or plan does not make sense or does not fit the model."""


class FormatError(MiloError):
    """A compressed folder breaks the format's rules: unknown version, tampered plan, wrong tensors."""


class WeightError(MiloError):
    """A weight holds values that cannot be compressed (NaN or Inf)."""


class HubError(MiloError):
    """A model hub refused what was asked of it, or cannot be reached."""


class DeviceError(MiloError):
    """A device that was asked for is absent, has too little memory, or its worker died."""


class ServingError(MiloError):
    """vLLM was asked for something that the plugin cannot serve: a version, a layout of GPUs, a kind of layer."""
