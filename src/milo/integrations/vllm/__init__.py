"""The vLLM plugin: compressed folders served by `vllm serve DIR`, compensators on.

vLLM finds it by the entry point `milo` of the group `vllm.general_plugins` and calls `register` in every one of its
processes. The names:

* quantisation method (in `config.json`, so no flag is needed, and in `--quantization`): `milo`, as everywhere else;
* `milo.integrations.vllm.config.MiloQuantizationConfig`: vLLM's quantisation config, read from the folder's plan;
* `milo.integrations.vllm.linear.MiloLinearMethod`, `milo.integrations.vllm.experts.MiloExpertsMethod`: its methods;
* `milo.integrations.vllm.versions.OLDEST`, `NEWEST`: the vLLM versions it has been tested with. With any other,
  compressed folders are refused at start and everything else is served as before.

How it works. A layer of vLLM asks the config for a method; the config knows the plan's rows by the names that vLLM
gives their modules, so structure, not models, decides what is compressed. The method registers empty parameters with
the stored tensors' names, whose loaders cut this rank's shard out of each tensor (`milo.format.shards`) and keep it on
the device. As soon as the last tensor of a layer is there, the layer is moved to the kernels' layout and the
tensors are let go: beside the packed model there is never more than what belongs to unfinished layers.

Importing this package imports no vLLM; its modules do, but for `versions`.
"""

from __future__ import annotations

from milo.integrations.vllm.versions import supported


def register() -> None:
    """Make vLLM know the method; may be called any number of times."""
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    from milo.checkpoint.compressed import QUANT_METHOD

    if supported(vllm.__version__):
        from milo.integrations.vllm.config import MiloQuantizationConfig as config
    else:
        from milo.integrations.vllm.refusing import RefusingConfig as config
    register_quantization_config(QUANT_METHOD)(config)
