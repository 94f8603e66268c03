"""MiLo: INT3 weights plus low-rank compensators for Mixture-of-Experts models, without calibration data.

Importing it has one side effect: it registers the `milo` quantizer with transformers, so that
`AutoModelForCausalLM.from_pretrained` understands compressed folders.
"""

from __future__ import annotations

__version__ = "0.1.0"

from milo.integrations.transformers.memory import compress_model, save_compressed
from milo.integrations.transformers.quantizer import MiloConfig

__all__ = ["MiloConfig", "__version__", "compress_model", "save_compressed"]
