"""vLLM's own models on a CPU, without vLLM's compiled parts: real layers, loaders and process groups.

`logits` builds the model class that `vllm serve` would, in as many processes as it would have GPUs (forked, over gloo),
loads a folder through vLLM's loader and runs a prompt. Only what is compiled in vLLM has a stand-in in PyTorch here:
attention (over the whole prompt, without a cache) and the top-k of routers.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm.platforms
from torch.nn import functional as F
from vllm.platforms.interface import UnspecifiedPlatform


class HostPlatform(UnspecifiedPlatform):
    """A platform without kernels of its own."""

    simple_compile_backend = "eager"

    @classmethod
    def get_attn_backend_cls(cls, *arguments: Any, **more: Any) -> str:
        return "vllm_host.Backend"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"


vllm.platforms._current_platform = HostPlatform()

from vllm import _custom_ops  # noqa: E402
from vllm.config import (  # noqa: E402
    CompilationConfig,
    CompilationMode,
    CUDAGraphMode,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import parallel_state  # noqa: E402
from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.model_executor.layers.attention import Attention, MLAAttention, mla_attention  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402


class Backend:
    """What attention layers ask for while they are built."""

    forward_includes_kv_cache_update = True

    class Impl:
        supports_quant_query_input = is_sparse = False
        dcp_world_size = 1

        def __init__(self, *arguments: Any, **more: Any) -> None: ...

        def process_weights_after_loading(self, dtype: torch.dtype) -> None: ...

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"

    @classmethod
    def get_impl_cls(cls) -> type:
        return cls.Impl

    @staticmethod
    def get_required_kv_cache_layout() -> None: ...

    @staticmethod
    def is_mla() -> bool:
        return True

    @staticmethod
    def supports_alibi_sqrt() -> bool:
        return False


def _attention(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **more: Any
) -> torch.Tensor:
    q = query.view(-1, self.num_heads, self.head_size).transpose(0, 1)
    k, v = (t.view(len(query), self.num_kv_heads, -1).transpose(0, 1) for t in (key, value))
    k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 0) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(0, 1).flatten(1)


def _latent_attention(
    self: Any, q: torch.Tensor, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, *arguments: Any, **more: Any
) -> torch.Tensor:
    """Through the absorbed `kv_b_proj`, as decoding does it."""
    kv_c_normed = kv_c_normed.to(self.kv_b_proj.weight.dtype)  # as vLLM's prefill does after a cached context
    nope, rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
    latent = torch.einsum("thn,hnl->htl", nope, self.W_UK_T)
    q, k = torch.cat([latent, rope.transpose(0, 1)], -1), torch.cat([kv_c_normed, k_pe.flatten(1)], -1)
    k, v = (t.expand(self.num_heads, -1, -1) for t in (k, kv_c_normed))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
    return torch.einsum("htl,hlv->thv", out, self.W_UV).flatten(1)


def _topk(score: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """vLLM's compiled router: the best scores, chosen with a bias if there is one."""

    def topk(
        weights: torch.Tensor,
        indices: torch.Tensor,
        slots: torch.Tensor,
        logits: torch.Tensor,
        renormalize: bool = False,
        bias: torch.Tensor | None = None,
        *arguments: Any,
        **more: Any,
    ) -> None:
        scores = score(logits.float())
        chosen = (scores if bias is None else scores + bias).topk(weights.shape[1]).indices
        values = scores.gather(1, chosen)
        weights.copy_(values / values.sum(-1, keepdim=True) if renormalize else values)
        indices.copy_(chosen)

    return topk


Attention.forward = _attention
MLAAttention.forward = _latent_attention
registry._run_in_subprocess = lambda function: function()  # it imports vLLM again only to look at a class
torch.accelerator.empty_cache = lambda: None
mla_attention.get_mla_prefill_backend = lambda settings: Backend.Impl
_custom_ops.topk_softmax = _topk(lambda logits: logits.softmax(-1))
_custom_ops.topk_sigmoid = _topk(torch.sigmoid)


def config(
    folder: Path, tensor: int = 1, pipeline: int = 1, experts: bool = False, compiled: bool = False, **more: Any
) -> VllmConfig:
    """vLLM's configuration of a server of this folder.

    Args:
        folder: the model.
        tensor: GPUs of tensor parallelism.
        pipeline: its stages.
        experts: whether experts are spread instead of cut.
        compiled: whether vLLM traces the model with torch.compile and cuts it at attention, as it does by default.
        more: fields of `ModelConfig`, and `load_format`.
    """
    tracing: dict[str, Any] = {}
    if compiled:
        eager = {"backend": "eager", "cudagraph_mode": CUDAGraphMode.NONE, "compile_sizes": []}
        tracing = {"mode": CompilationMode.VLLM_COMPILE, **eager}
    options = {"dtype": "float16", "load_format": "auto", "max_model_len": 64, **more}
    load = LoadConfig(load_format=options.pop("load_format"))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, enforce_eager=not compiled, **options)
    parallel = ParallelConfig(
        tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, enable_expert_parallel=experts
    )
    return VllmConfig(
        model_config=model,
        load_config=load,
        parallel_config=parallel,
        device_config=DeviceConfig("cpu"),
        compilation_config=CompilationConfig(custom_ops=["none"], **tracing),
    )


def start(settings: VllmConfig, rank: int, port: int) -> None:
    """Join the other ranks' process groups."""
    parallel = settings.parallel_config
    with set_current_vllm_config(settings):
        address = f"tcp://127.0.0.1:{port}"
        parallel_state.init_distributed_environment(parallel.world_size, rank, address, rank, "gloo")
        parallel_state.initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)


def load(settings: VllmConfig, rank: int, port: int) -> torch.nn.Module:
    """This rank's model, loaded as vLLM loads it."""
    start(settings, rank, port)
    with set_current_vllm_config(settings):
        loader = get_model_loader(settings.load_config)
        return loader.load_model(vllm_config=settings, model_config=settings.model_config)


def build(settings: VllmConfig, rank: int, port: int) -> torch.nn.Module:
    """This rank's model, without weights."""
    start(settings, rank, port)
    with set_current_vllm_config(settings), set_default_torch_dtype(settings.model_config.dtype):
        return initialize_model(vllm_config=settings)


@torch.inference_mode()
def run(model: torch.nn.Module, settings: VllmConfig, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits `[T, V]` of a prompt, on the first rank of the last stage; None on the others."""
    stages = parallel_state.get_pp_group()
    received = None
    if not stages.is_first_rank:
        received = _intermediate(stages.recv_tensor_dict())
    with set_current_vllm_config(settings), set_forward_context(None, settings, num_tokens=len(tokens)):
        hidden = model(tokens, torch.arange(len(tokens)), received)
        if not stages.is_last_rank:
            stages.send_tensor_dict(hidden.tensors)
            return None
        logits = model.compute_logits(hidden)
    return None if logits is None else logits[:, : settings.model_config.get_vocab_size()].float()


def _intermediate(tensors: dict[str, torch.Tensor] | None) -> Any:
    from vllm.sequence import IntermediateTensors

    return IntermediateTensors(tensors or {})


def logits(folder: Path, tokens: torch.Tensor, **layout: Any) -> torch.Tensor:
    """Logits `[T, V]` of a prompt from as many processes as the layout has GPUs (see `config`)."""
    found = in_processes(_worker, layout.get("tensor", 1) * layout.get("pipeline", 1), folder, tokens, layout)
    first, *others = [logits for logits in found if logits is not None]
    assert all(torch.equal(first, other) for other in others)  # tensor parallel ranks gather the same
    return first


def _worker(rank: int, port: int, folder: Path, tokens: torch.Tensor, layout: dict[str, Any]) -> torch.Tensor | None:
    settings = config(folder, **layout)
    return run(load(settings, rank, port), settings, tokens)


def in_processes(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """What `function(rank, port, *arguments)` returns in each of `count` forked processes."""
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    done, port = context.Event(), free_port()
    workers = [
        context.Process(target=_call, args=(function, rank, port, arguments, results, done)) for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < count:
            rank, error, value = results.get(timeout=120)
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
            found[rank] = pickle.loads(value)
    except queue.Empty:
        raise RuntimeError("a worker did not answer in two minutes") from None
    finally:
        done.set()
        for worker in workers:
            worker.terminate()
            worker.join()
    return [found[rank] for rank in range(count)]


def _call(
    function: Callable[..., Any], rank: int, port: int, arguments: tuple[Any, ...], results: Any, done: Any
) -> None:
    try:
        results.put((rank, "", pickle.dumps(function(rank, port, *arguments))))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    results.close()
    results.join_thread()
    done.wait(60)  # the others may still be talking to this process, or reading what it shares


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
