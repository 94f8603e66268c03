"""Decode speed inside transformers: a model of real width with random weights, with and without kernels, and in bf16.

    python benchmarks/generate.py [--shape mixtral-8x7b] [--layers 4] [--batch 1 8] [--out FILE.json]

No checkpoint is read: codes, scales and factors are random, so speed and memory are those of the real shapes, and the
text would be noise. A step is one token a sequence with a cache behind it, eager, as `generate` runs it; the median of
the steps is reported, host time included. bf16 is the same model uncompressed, if it fits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from milo.integrations.transformers.assembly import finish, sites
from milo.integrations.transformers.memory import inventory_of
from milo.modules.matrix import CompressedMatrix
from milo.modules.packed import use_kernels
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import custom_recipe

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    },
    "tiny": {
        "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 256,
    },
}  # fmt: skip


def build(shape: str, layers: int, device: str, ranks: str | None) -> PreTrainedModel:
    """A model of that shape in bfloat16; with `ranks` (a policy) compressed, its packed tensors random."""
    config = AutoConfig.for_model(**SHAPES[shape], num_hidden_layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if ranks is not None:
        settings = config.to_dict()
        recipe = custom_recipe("milo-s1", settings, ranks=ranks)
        plan = make_plan(inventory_of(model)[0], recipe, settings, Evidence(lambda group: []))
        places = sites(model, plan)
        for site in places:
            site.attach(model)
        finish(model, places)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            packed = isinstance(module, CompressedMatrix) and name != "bias"
            _randomise(tensor.data, name if packed else "", generator)
    rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    model.model.rotary_emb = rotary.to(device)
    return model.eval()


def _randomise(tensor: torch.Tensor, packed: str, generator: torch.Generator) -> None:
    if tensor.dtype == torch.int32:
        tensor.random_(-(2**31), 2**31 - 1, generator=generator)
    elif packed.endswith("zero"):
        tensor.fill_(3.5)
    elif packed:
        tensor.uniform_(0.001, 0.002, generator=generator)
    elif tensor.ndim == 1:
        tensor.fill_(1)
    else:
        tensor.normal_(0, 0.02, generator=generator)


@torch.inference_mode()
def step_ms(model: PreTrainedModel, batch: int, steps: int, context: int = 32) -> float:
    """Median milliseconds of a decode step."""
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
    cache = model(ids, use_cache=True).past_key_values
    times = []
    for _ in range(steps + 3):
        _wait(device)
        begin = time.perf_counter()
        logits = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
        _wait(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(shape: str, layers: int, batches: list[int], device: str, steps: int, ranks: str) -> dict[str, Any]:
    """Every variant, one after the other, so that one model is held at a time."""
    rows: list[dict[str, Any]] = [{"batch": batch} for batch in batches]
    result: dict[str, Any] = {"shape": shape, "layers": layers, "ranks": ranks, "rows": rows}
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for variant in ("kernels", "reference", "bf16"):
        try:
            model = build(shape, layers, device, None if variant == "bf16" else ranks)
        except torch.OutOfMemoryError:
            continue
        if variant == "kernels":
            result["left_to_reference"] = use_kernels(model, device)
        held = [*model.parameters(), *model.buffers()]
        result[f"{variant}_bytes"] = sum(tensor.nbytes for tensor in held)
        for row in rows:
            row[f"{variant}_ms"] = round(step_ms(model, row["batch"], steps), 3)
        del model
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ranks", default="dense:h/8+sparse:16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(
        arguments.shape, arguments.layers, arguments.batch, arguments.device, arguments.steps, arguments.ranks
    )
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
