"""The model card of a compressed folder: what it is, what it cost, and how to load it without surprises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any], report: Mapping[str, Any], base_model: str | None) -> str:
    """`README.md` with the metadata block that model hubs read.

    Args:
        config: the output's `config.json`.
        report: the compression report.
        base_model: name of the source; a local path is described but not linked.
    """
    is_hub_name = base_model is not None and base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    header = ["---", "library_name: transformers", "tags:", "- milo", "- quantized", "- mixture-of-experts"]
    if is_hub_name:
        header.append(f"base_model: {base_model}")
    header.append("---")
    errors = [m["error"] for m in report["matrices"]]
    mean_error = sum(errors) / len(errors)
    source = base_model or "a model in memory"
    plan = config["quantization_config"]["plan"]
    return "\n".join(
        [
            *header,
            f"# {source.rstrip('/').rsplit('/', 1)[-1]}, compressed with MiLo",
            "",
            f"Made from `{source}` with the recipe `{report['recipe']}` (rank policy `{report['policy']}`, "
            f"{plan['rounds']} rounds at most), without calibration data.",
            "",
            "## Load it",
            "",
            "```python",
            "import milo  # first: without it transformers fills the experts with random numbers",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", device_map="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
            "```",
            "",
            "`pip install milo-moe` provides `milo`. Loading without it does not fail: transformers only warns of an "
            "unknown `quant_method` and then initialises the compressed matrices randomly.",
            "",
            "## What it holds",
            "",
            "| | |",
            "|---|---|",
            f"| compressed weights | {report['compressed_weights']:,} |",
            f"| their bytes | {report['compressed_bytes']:,} ({report['bits_per_weight']:.3f} bits a weight) |",
            f"| all tensor files | {report['files_bytes']:,} bytes |",
            f"| mean relative error of a matrix | {mean_error:.4f} |",
            "",
            "`milo inspect THIS_FOLDER` shows bits, rank and error by role, `milo_report.json` every matrix.",
            "",
        ]
    )
