"""The serving benchmark without vLLM: its arithmetic, its folders, its tables, and a run with a stand-in engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from milo.checkpoint.compressed import plan_from_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# An engine of 2 ms a step and 1 ms a prompt's thousand tokens.
FAKE_VLLM = """
import time
from types import SimpleNamespace

__version__ = "0.26.0"

def SamplingParams(**options):
    return SimpleNamespace(**options)

class LLM:
    def __init__(self, model, load_format, worker_extension_cls, **options):
        if load_format == "dummy-filled":
            raise RuntimeError("no such kernel here")

    def generate(self, inputs, sampling, use_tqdm):
        time.sleep(0.002 * sampling.max_tokens)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * sampling.max_tokens)]) for _ in inputs]

    def collective_rpc(self, method):
        return [{"weights": {"experts": 3 << 20, "head": 1 << 20}, "cache": 0, "allocated": 5 << 20}]
"""


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import published
        import serve
        import serve_memory
        import serve_table

        yield {"published": published, "serve": serve, "memory": serve_memory, "table": serve_table}


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3"])
def test_the_configs_are_those_of_the_published_models(modules: dict[str, Any], name: str) -> None:
    """A wrong width, depth or number of experts would change the count."""
    published = modules["published"]
    heads, _ = published.heads_of(published.config_of(name))
    assert sum(prod(head.shape) for head in heads) == published.PARAMETERS[name]


def test_a_step_is_the_difference_of_two_lengths(modules: dict[str, Any]) -> None:
    """Start (0.5 s, now and then 3 s) and prefill cancel; the median ignores the odd run."""
    calls: list[tuple[int, int]] = []

    def generate(prompts: Sequence[Sequence[int]], new: int) -> float:
        calls.append((len(prompts), new))
        return 0.5 + 0.001 * len(prompts) * len(prompts[0]) + 0.004 * new + (3 if len(calls) == 2 else 0)

    found = modules["serve"].decode_ms(generate, 8, 100, 16, 144, 3)
    assert found["batch"] == 8
    assert found["ms"] == pytest.approx(4.0)
    assert calls == 3 * [(8, 16), (8, 144)]
    rate = modules["serve"].prefill_rate(lambda prompts, new: 0.5, 2048, 100, 3)
    assert rate["tokens_per_s"] == 4096


def test_prompts_never_repeat(modules: dict[str, Any]) -> None:
    """A repeated prompt could be answered from a cache."""
    seen: list[tuple[int, ...]] = []

    def generate(prompts: Sequence[Sequence[int]], new: int) -> float:
        seen.extend(map(tuple, prompts))
        return 1.0

    modules["serve"].decode_ms(generate, 4, 1000, 1, 2, 3)
    assert len(set(seen)) == len(seen) == 4 * 2 * 3
    assert all(0 <= token < 1000 for prompt in seen for token in prompt)


def test_a_new_row_replaces_the_old_one_of_the_same_thing(modules: dict[str, Any]) -> None:
    row = {"shape": "a", "layers": 2, "system": "ours", "device": "x", "value": 1}
    merged = modules["serve"].merge([row, {**row, "system": "bf16"}], [{**row, "value": 2}])
    assert [(each["system"], each["value"]) for each in merged] == [("ours", 2), ("bf16", 1)]


def test_folders_hold_what_vllm_is_told(modules: dict[str, Any], tmp_path: Path) -> None:
    serve, config = modules["serve"], modules["published"].config_of("tiny")
    promised = serve.write_folder(tmp_path / "ours", "ours", config)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    plan = plan_from_config(written["quantization_config"], "ours")
    assert promised["compressed"] == plan.nbytes
    assert plan.recipe == "milo-s2"
    assert len({rank for row in plan.rows if row.role == "expert" for rank in row.ranks}) > 1
    assert serve.write_folder(tmp_path / "bf16", "bf16", config) == {}
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())
    serve.write_folder(tmp_path / "int4", "int4", config)
    assert json.loads((tmp_path / "int4/config.json").read_text())["quantization_config"]["bits"] == 4


def test_mixtrals_ranks_are_the_papers(modules: dict[str, Any]) -> None:
    """milo-s2 gives the experts of the released model 25,632 ranks in all."""
    serve, published = modules["serve"], modules["published"]
    config = published.config_of("mixtral-8x7b")
    _, inventory = published.heads_of(config)
    plan = serve.make_plan(inventory, serve.preset("milo-s2", config), config, serve.Evidence(serve.made_up_kurtosis))
    ranks = [rank for row in plan.rows if row.role == "expert" for rank in row.ranks]
    assert len(ranks) == 768
    assert sum(ranks) == 25_632


def test_memory_fits_by_arithmetic(modules: dict[str, Any]) -> None:
    memory = modules["memory"]
    row = memory.rows_of("mixtral-8x7b", "milo-s1")
    gib = (row["compressed"] + row["other"]) / 2**30
    assert 19.5 < gib < 20
    gpus, tokens = row["fits"]["H100"]
    room = 0.92 * 81_559 / 1024 - gib - memory.WORKING
    assert (gpus, tokens) == (1, int(room * 2**30 / 131_072))
    assert row["fits"]["RTX 4090"][0] == 2
    assert "| mixtral-8x7b | 87.0 |" in memory.table([row])


def test_tables(modules: dict[str, Any]) -> None:
    def row(system: str, ms: float, rate: float, promised: int | None) -> dict[str, Any]:
        return {
            "shape": "a", "layers": 2, "device": "x", "vllm": "0.26.0", "attention": "T", "system": system,
            "decode": [{"batch": 1, "ms": ms}], "prefill": [{"tokens": 2048, "tokens_per_s": rate}],
            "promised": {"compressed": promised} if promised else {},
            "memory": {"weights": {"experts": 2**31, "head": 2**30}, "cache": 2**30, "allocated": 9 * 2**29},
        }  # fmt: skip

    text = modules["table"].tables([row("bf16", 4.0, 1e4, None), row("ours", 2.0, 9e3, 2**31)])
    assert "### a, 2 layers, x, vLLM 0.26.0, T" in text
    lines = text.splitlines()
    assert "| MiLo INT3 | 2.00 | 9,000 |" in lines
    assert "| bf16 | 4.00 (2.00×) | 10,000 (0.90×) |" in lines
    assert "| MiLo INT3 | 2.000 | 1.000 | 3.000 | 2.000 | 1.0000 | 1.000 | 0.500 |" in lines


def test_a_run_with_a_stand_in_engine(tmp_path: Path) -> None:
    """Both systems boot at once; the one that fails is reported with its log, the other's row is added to the file."""
    for name in ("serve.py", "published.py", "kurtosis.py"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    (tmp_path / "serve_worker.py").touch()
    out = tmp_path / "found.json"
    old = {"shape": "tiny", "layers": 2, "system": "bf16", "device": "cpu"}
    out.write_text(json.dumps({"rows": [old]}))
    options = ["--shape", "tiny", "--systems", "ours", "int4", "--together", "--batches", "1", "2", "--prompts", "64"]
    options += ["--repeats", "2", "--long", "48", "--out", str(out)]
    command = [sys.executable, str(tmp_path / "serve.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "int4 failed; the end of its log" in done.stdout
    assert "no such kernel here" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == old
    assert (rows[1]["system"], rows[1]["device"], rows[1]["boot_s"]) == ("ours", "cpu", 0.0)
    assert [each["ms"] for each in rows[1]["decode"]] == pytest.approx([2.0, 2.0], rel=0.5)
