"""MiLo: INT3 weights plus low-rank compensators for Mixture-of-Experts models, without calibration data.

Importing it has one side effect: it registers the `milo` quantizer with transformers, so that
`AutoModelForCausalLM.from_pretrained` understands compressed folders.
"""

from __future__ import annotations

__version__ = "0.1.0"

from milo.errors import MiloError
from milo.integrations.plain import load_compressed
from milo.integrations.transformers.memory import compress_model, save_compressed
from milo.integrations.transformers.quantizer import MiloConfig
from milo.modules.packed import use_kernels

__all__ = [
    "MiloConfig",
    "MiloError",
    "__version__",
    "compress_model",
    "load_compressed",
    "save_compressed",
    "use_kernels",
]
