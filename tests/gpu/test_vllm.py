"""Served by vLLM on a GPU, a compressed folder says what it says in transformers.

    VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_WORKER_MULTIPROC_METHOD=spawn \\
        python -m pytest tests/gpu/test_vllm.py -m "gpu and vllm" -x -s

Both trained models and a random one with latent attention, compressed with compensators, with CUDA graphs: the
perplexity of WikiText-2 windows through prompt log-probabilities, and greedy continuations. The reference is
transformers in float32, which computes with PyTorch alone. One engine is started for each test; those of two ranks
need two GPUs.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM

import builders

pytest.importorskip("vllm", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]
SHARED = next((folder for folder in (ROOT / "shared", ROOT.parent / "shared") if folder.is_dir()), ROOT)
WINDOW, WINDOWS, PROMPTS, STEPS = 512, 16, (7, 33, 64, 200), 32
LATENT = "latent"  # a random model with the head sizes of the published DeepSeek-V2


@dataclass(frozen=True)
class Asked:
    """What vLLM has to be told of a model."""

    backend: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


# transformers' DeepSeek-V2 does not read norm_topk_prob, which deepseek-29m's config has, and reads "no groups of
# experts" as one group; vLLM's does and does not. Its latent attention on a Hopper GPU has no prefill for heads of
# deepseek-29m's sizes, so attention is expanded there.
TOLD = {
    "mixtral-29m": Asked("TRITON_ATTN"),
    "deepseek-29m": Asked(
        "TRITON_ATTN", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}, {"VLLM_MLA_DISABLE": "1"}
    ),
    LATENT: Asked("TRITON_MLA"),
}
# A token whose router is all but undecided goes to another expert now and then, and its logits move by some per cent.
GAP = {"float16": 0.3, "bfloat16": 0.5}  # logits by which a greedy token may miss the reference's first choice
EQUAL = {"float16": 0.95, "bfloat16": 0.9}  # share of greedy tokens that are its first choice


class Reference:
    """A compressed folder in transformers, float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cuda")
        self.windows = _text(folder)[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)
        nll = [F.cross_entropy(self.logits(w)[:-1], w[1:].cuda(), reduction="sum").item() for w in self.windows]
        self.loss = sum(nll) / (WINDOWS * (WINDOW - 1))

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids.cuda()[None]).logits[0]


def _text(folder: Path) -> torch.Tensor:
    """WikiText-2 in the model's tokens; noise for a model without a tokenizer."""
    if not (folder / "tokenizer.json").exists():
        return torch.randint(1, 1000, (WINDOW * WINDOWS,), generator=torch.Generator().manual_seed(3))
    text = (SHARED / "data" / "wikitext2" / "wiki.test.hf_join.txt").read_text(encoding="utf-8")
    return torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text[: 40 * WINDOW * WINDOWS]).ids)


def _latent(folder: Path) -> Path:
    config = DeepseekV2Config(
        vocab_size=1024, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=1024, moe_intermediate_size=192, n_routed_experts=16, num_experts_per_tok=4,
        n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1,
        max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(0)
    DeepseekV2ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def references(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """By model; made when first asked for."""
    given = request.config.getoption("--compressed", default=None)
    if not (SHARED / "models").is_dir():
        pytest.skip("needs ../shared/models")

    class Made(dict[str, Reference]):
        def __missing__(self, name: str) -> Reference:
            root = tmp_path_factory.mktemp("served")
            folder = Path(given) / name if given and name != LATENT else root / name
            if not folder.exists():
                source = _latent(root / "source") if name == LATENT else SHARED / "models" / name
                builders.compress(source, folder, ranks="dense:64+kurtosis:16", rounds=3)
            self[name] = Reference(folder)
            return self[name]

    return Made()


@pytest.fixture(scope="module", autouse=True)
def announced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The plugin is found by this process and by vLLM's, even where MiLo runs from a source tree."""
    if any(point.name == "milo" for point in entry_points(group="vllm.general_plugins")):
        yield
        return
    site = tmp_path_factory.mktemp("site")
    info = site / "milo_moe-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: milo-moe\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nmilo = milo.integrations.vllm:register\n")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), str(ROOT / "src"), before]))
    sys.path.insert(0, str(site))
    yield
    sys.path.remove(str(site))
    os.environ["PYTHONPATH"] = before


@pytest.mark.parametrize(
    ("name", "dtype", "ranks", "experts"),
    [
        ("mixtral-29m", "float16", 1, False),
        ("mixtral-29m", "bfloat16", 1, False),
        ("deepseek-29m", "float16", 1, False),
        ("deepseek-29m", "bfloat16", 1, False),
        (LATENT, "float16", 1, False),
        ("mixtral-29m", "float16", 2, False),  # 224 of 448 in-features: three and a half groups
        ("deepseek-29m", "float16", 2, True),
    ],
)
def test_vllm_says_what_transformers_says(
    name: str,
    dtype: str,
    ranks: int,
    experts: bool,
    references: dict[str, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    if name == LATENT and importlib.util.find_spec("vllm.vllm_flash_attn._vllm_fa3_C") is None:
        pytest.skip("latent attention needs FlashAttention 3 for its prefill, which this vLLM came without")
    for variable, value in TOLD[name].environment.items():
        monkeypatch.setenv(variable, value)
    reference = references[name]
    loss, continuations = serve(reference, name, dtype, ranks, experts)
    equal, gap = compare(reference, continuations)
    excess = loss - reference.loss
    print(
        f"\n{name} {dtype} on {ranks}: perplexity {2.718281828**loss:.4f} against "
        f"{2.718281828**reference.loss:.4f} ({excess:+.2e} nats), {equal:.1%} of greedy tokens, largest gap {gap:.3f}"
    )
    assert abs(excess) < 2e-3  # 0.2 % of perplexity
    assert equal >= EQUAL[dtype]
    assert gap <= GAP[dtype]


def serve(
    reference: Reference, name: str, dtype: str, ranks: int, experts: bool
) -> tuple[float, list[tuple[list[int], list[int]]]]:
    """Mean loss over the windows, and greedy continuations of prompts, from one engine."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(reference.folder),
        dtype=dtype,
        tensor_parallel_size=ranks,
        enable_expert_parallel=experts,
        attention_backend=TOLD[name].backend,
        hf_overrides=dict(TOLD[name].overrides),
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,  # given, not profiled: engines may run side by side
        gpu_memory_utilization=0.1,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]},
    )
    try:
        ask = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        windows = [{"prompt_token_ids": window.tolist()} for window in reference.windows]
        total = 0.0
        for window, answer in zip(windows, engine.generate(windows, ask, use_tqdm=False), strict=True):
            for token, found in zip(window["prompt_token_ids"][1:], answer.prompt_logprobs[1:], strict=True):
                total -= found[token].logprob
        greedy = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
        prompts = [reference.windows[i, :length].tolist() for i, length in enumerate(PROMPTS)]
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
        continuations = [(p, list(a.outputs[0].token_ids)) for p, a in zip(prompts, answers, strict=True)]
        return total / (WINDOWS * (WINDOW - 1)), continuations
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def compare(reference: Reference, continuations: list[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """Share of tokens that the reference would have chosen after the same tokens, and the most that one misses by."""
    equal, worst, count = 0, 0.0, 0
    for prompt, tokens in continuations:
        assert len(tokens) == STEPS
        logits = reference.logits(torch.tensor(prompt + tokens))[len(prompt) - 1 : -1]
        chosen = logits[torch.arange(STEPS), torch.tensor(tokens)]
        equal += int((logits.argmax(-1).cpu() == torch.tensor(tokens)).sum())
        worst = max(worst, (logits.max(-1).values - chosen).max().item())
        count += STEPS
    return equal / count, worst
