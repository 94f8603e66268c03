"""Speed and memory of vLLM on full-size shapes without checkpoints: ours beside bf16, INT4 and Humming's INT3.

    python benchmarks/serve.py --shape qwen3-30b-a3b --systems ours int4 humming3 --together --out FILE.json
    python benchmarks/serve.py --shape qwen3-30b-a3b --systems bf16 --out FILE.json        (adds to the file)
    python benchmarks/serve_table.py FILE.json

| system | what it is |
|---|---|
| `ours` | `milo-s2`: INT3 g64, compensators on; a folder without weights, whose codes our plugin makes up |
| `bf16` | vLLM's own bf16 |
| `int4` | GPTQ, group 128, symmetric, in vLLM's default kernels (for the experts Marlin) |
| `int4-humming` | the same with `moe_backend=humming` |
| `humming3` | Humming's kernels: INT3, group 64, no zero point |

All keep embedding, head and routers in bf16, whose dummy values are the same. Tokens are sampled at temperature 1, so
that the sequences of a batch go different ways and touch different experts, as texts do. A decode step is the
difference of two runs that differ in their length alone, divided by it: start and prefill cancel. Prefill is one prompt
and one token. Each system has a process of its own; with `--together` they boot at the same time, while none is
measured, and are measured one after the other, while the others rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kurtosis import made_up_kurtosis
from published import MODELS, config_of, heads_of

from milo.checkpoint.writer import write_atomically
from milo.integrations.serving import weights
from milo.pipeline.compress import quantization_config
from milo.plan.plan import make_plan
from milo.plan.ranks import Evidence
from milo.plan.recipe import preset

Generate = Callable[[Sequence[Sequence[int]], int], float]  # prompts, new tokens each -> seconds

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
    "modules_in_block_to_quantize": [ATTENTION],  # without it vLLM looks into the shards, and there are none
}  # fmt: skip
HUMMING3 = {"dtype": "int3", "group_size": 64, "ignore": ["mlp.gate", "block_sparse_moe.gate"]}
FILLED, HUMMING = "dummy-filled", "humming3"  # as in serve_worker.py, which imports vLLM
SYSTEMS: Mapping[str, Mapping[str, Any]] = {  # options of vllm.LLM
    "ours": {"load_format": "dummy"},
    "bf16": {"load_format": "dummy"},
    "int4": {"load_format": FILLED},
    "int4-humming": {"load_format": FILLED, "moe_backend": "humming"},
    "humming3": {"load_format": FILLED, "quantization": HUMMING},
}
ENVIRONMENT = {  # vLLM's own switches
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_HUMMING_ONLINE_QUANT_CONFIG": json.dumps(HUMMING3),
}  # fmt: skip
CONTEXT = 32  # tokens of a prompt before decoding
CACHE_BYTES = 2 << 30


def write_folder(folder: Path, system: str, config: Mapping[str, Any]) -> dict[str, int]:
    """A model folder without weights; returns the bytes that a plan promises (`ours` only)."""
    config, promised = dict(config), {}
    if system == "ours":
        heads, inventory = heads_of(config)
        plan = make_plan(inventory, preset("milo-s2", config), config, Evidence(made_up_kurtosis))
        config["quantization_config"] = quantization_config(plan, None)
        found = weights(plan, heads, config)
        promised = {"compressed": found.compressed, "other": found.other}
    elif system.startswith("int4"):
        config["quantization_config"] = GPTQ
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return promised


def prompts(count: int, tokens: int, vocabulary: int, source: random.Random) -> list[list[int]]:
    """Random tokens, different at every call."""
    return [[source.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]


def decode_ms(generate: Generate, batch: int, vocabulary: int, short: int, long: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step of `batch` sequences: the median of `repeats` differences, and all of them."""
    source = random.Random(batch)
    found = []
    for _ in range(repeats):
        begun = generate(prompts(batch, CONTEXT, vocabulary, source), short)
        ended = generate(prompts(batch, CONTEXT, vocabulary, source), long)
        found.append(1e3 * (ended - begun) / (long - short))
    return {"batch": batch, "ms": median(found), "all_ms": found}


def prefill_rate(generate: Generate, tokens: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of one prompt: the median of `repeats`, and all of them."""
    source = random.Random(tokens)
    found = [tokens / generate(prompts(1, tokens, vocabulary, source), 1) for _ in range(repeats)]
    return {"tokens": tokens, "tokens_per_s": median(found), "all_tokens_per_s": found}


def measure(generate: Generate, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every batch and every prompt; the first run of each is thrown away (kernels are compiled in it)."""
    decode, prefill = [], []
    for batch in options.batches:
        decode_ms(generate, batch, vocabulary, 1, options.short, 1)
        decode.append(decode_ms(generate, batch, vocabulary, options.short, options.long, options.repeats))
    for tokens in options.prompts:
        prefill_rate(generate, tokens, vocabulary, 2)
        prefill.append(prefill_rate(generate, tokens, vocabulary, options.repeats))
    return {"decode": decode, "prefill": prefill}


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both; a new one takes the place of the old one of the same shape, layers, system and device."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("shape", "layers", "system", "device"))

    return list({key(row): row for row in [*old, *new]}.values())


def run_child(options: argparse.Namespace) -> None:
    """One system: boot, say so, wait for leave, measure, leave a JSON file."""
    os.environ.update(ENVIRONMENT)
    import serve_worker  # noqa: F401  (vLLM is to know its names)
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    system, gate = options.child, options.gate
    config = config_of(options.shape, options.layers)
    folder = gate / system
    promised = write_folder(folder, system, config)
    begin = time.perf_counter()
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        attention_backend=options.attention,
        worker_extension_cls="serve_worker.Probe",
        max_model_len=max([CONTEXT + options.long, *options.prompts]) + 16,
        max_num_batched_tokens=max([2048, *options.prompts]),
        max_num_seqs=max(options.batches),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=CACHE_BYTES,
        gpu_memory_utilization=0.1,  # what must be free at start; the cache's size is given
        compilation_config={"cudagraph_capture_sizes": sorted(options.batches)},
        **SYSTEMS[system],
    )
    boot = time.perf_counter() - begin

    def generate(tokens: Sequence[Sequence[int]], new: int) -> float:
        sampling = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(each)} for each in tokens]
        start = time.perf_counter()
        done = llm.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(each.outputs[0].token_ids) != new for each in done):
            raise SystemExit("a sequence ended early")
        return seconds

    (gate / f"{system}.ready").touch()
    while not (gate / f"{system}.go").exists():
        time.sleep(0.02)
    row = {
        "shape": options.shape,
        "system": system,
        "layers": config["num_hidden_layers"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "attention": options.attention,
        "boot_s": round(boot, 1),
        "promised": promised,
        "memory": llm.collective_rpc("bench_memory")[0],
        **measure(generate, config["vocab_size"], options),
    }
    write_atomically(gate / f"{system}.json", json.dumps(row))


def run_group(systems: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Boot these systems at once, measure one after the other, and yield each's row as it is found.

    One that fails is reported and left out.
    """
    with tempfile.TemporaryDirectory() as work:
        gate = Path(work)
        children = {system: _start(system, gate, options) for system in systems}
        limit = time.monotonic() + options.boot_limit
        waiting = set(systems)
        while waiting and time.monotonic() < limit:
            waiting = {s for s in waiting if not (gate / f"{s}.ready").exists() and children[s].poll() is None}
            time.sleep(0.2)
        for system in waiting:
            print(f"{system}: not up after {options.boot_limit} s", flush=True)
            _end(children[system])
        for system, child in children.items():
            (gate / f"{system}.go").touch()
            found = gate / f"{system}.json"
            while child.poll() is None and not found.exists():
                time.sleep(0.2)
            if found.exists():
                row = json.loads(found.read_text())
                print(summary(row), flush=True)
                yield row
            else:
                print(f"{system} failed; the end of its log:\n{_log(system, options).read_text()[-3000:]}", flush=True)
            _end(child)


def summary(row: Mapping[str, Any]) -> str:
    """A line for people."""
    decode = "  ".join(f"{each['batch']}: {each['ms']:.3f} ms" for each in row["decode"])
    prefill = "  ".join(f"{each['tokens']}: {each['tokens_per_s']:,.0f}/s" for each in row["prefill"])
    held = sum(row["memory"]["weights"].values()) / 2**30
    return f"{row['shape']} {row['system']}: decode {decode} | prefill {prefill} | weights {held:.2f} GiB"


def _start(system: str, gate: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, *options.arguments, "--child", system, "--gate", str(gate)]
    with _log(system, options).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _log(system: str, options: argparse.Namespace) -> Path:
    return options.out.with_name(f"{options.out.stem}_{options.shape}_{system}.log")


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child and the engine it started, which are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer layers, to iterate")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=["ours", "int4", "humming3"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--short", type=int, default=16, help="tokens of the shorter run")
    parser.add_argument("--long", type=int, default=144, help="tokens of the longer run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="TRITON_ATTN", help="vLLM's attention backend")
    parser.add_argument("--together", action="store_true", help="boot all systems at once (their weights must fit)")
    parser.add_argument("--boot-limit", type=float, default=400, help="seconds")
    parser.add_argument("--out", type=Path, required=True, help="JSON; rows are added to what it holds")
    parser.add_argument("--child", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--gate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(arguments)
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if options.child:
        run_child(options)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for group in [options.systems] if options.together else [[each] for each in options.systems]:
        for row in run_group(group, options):  # written at once: whatever ends the run, this is kept
            old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
            options.out.write_text(json.dumps({"rows": merge(old, [row])}, indent=1) + "\n")


if __name__ == "__main__":
    main()
