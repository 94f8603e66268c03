"""`milo serve` for real: vLLM's server in a process of its own, asked by OpenAI's client.

Needs vLLM (with its plugin entry point: MiLo installed, or `benchmarks/vllm_site.py register`) and a GPU:
`python -m pytest tests/gpu/test_server.py -m "gpu and vllm"`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import builders
from judged import tiny_mixtral
from milo.evaluate.folder import load_model, load_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]
BOOT = 300  # seconds at most
PROMPT = "w3 w1 w4 w1 w5 w9 w2 w6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Mixtral of two layers, with compensators and a tokenizer of words."""
    root = tmp_path_factory.mktemp("server")
    size = {"vocab_size": 200, "hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 512}
    tiny_mixtral(0, initializer_range=0.05, **size).to(torch.bfloat16).save_pretrained(root / "source")
    builders.word_tokenizer(root / "source")
    builders.compress(root / "source", root / "tiny-milo", ranks="dense:32+kurtosis:16", rounds=2)
    return root / "tiny-milo"


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that answers; it is stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "milo.cli.app", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--attention-backend", "TRITON_ATTN", "--gpu-memory-utilization", "0.1"]
    command += ["--kv-cache-memory-bytes", str(1 << 30)]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        limit = time.monotonic() + BOOT
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < limit, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture
def client(address: str) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=address, api_key="none")


def test_the_model_goes_by_its_folders_name_and_by_its_path(client: Any, folder: Path) -> None:
    assert {model.id for model in client.models.list()} == {"tiny-milo", str(folder)}


def test_answers_are_those_of_transformers(client: Any, folder: Path) -> None:
    """Log-probabilities of every prompt token's successor, and of the first new token's five best."""
    model, tokenizer = load_model(folder, "bfloat16", "cuda"), load_tokenizer(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.cuda()
    with torch.no_grad():
        expected = model(ids).logits.float().log_softmax(-1)[0]
    options = {"max_tokens": 1, "temperature": 0, "logprobs": 5, "echo": True}
    by_number = {"return_tokens_as_token_ids": True}
    answer = client.completions.create(model="tiny-milo", prompt=PROMPT, extra_body=by_number, **options).choices[0]
    told = answer.logprobs.token_logprobs[1 : ids.shape[1]]
    wanted = expected[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert told == pytest.approx(wanted, abs=0.05)
    best = answer.logprobs.top_logprobs[-1]
    assert len(best) >= 5
    for token, value in best.items():
        assert value == pytest.approx(expected[-1, int(token.removeprefix("token_id:"))].item(), abs=0.05)


def test_a_stream_is_the_same_text(client: Any) -> None:
    options = {"model": "tiny-milo", "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "seed": 1}
    whole = client.completions.create(**options).choices[0].text
    pieces = [event.choices[0].text for event in client.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_many_at_once_get_what_each_would_get(client: Any) -> None:
    """A batch goes through other kernels than a single prompt: greedy texts agree as far as rounding allows."""
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(1, 41)]
    options = {"model": "tiny-milo", "max_tokens": 1, "temperature": 0, "logprobs": 1}
    together = client.completions.create(prompt=prompts, **options).choices
    for choice in (together[0], together[17], together[39]):
        alone = client.completions.create(prompt=prompts[choice.index], **options).choices[0]
        assert choice.logprobs.token_logprobs[0] == pytest.approx(alone.logprobs.token_logprobs[0], abs=0.05)
