"""Humming's weight-only kernels (package `humming-kernels`, 0.1.19), in the configurations that it chooses itself.

Left alone, a layer works out and compiles the kernels of every range of rows at its first call, some forty to ninety.
Here a call names the configuration of its own number of rows, which is the one that the range would have given, and
`compile_ahead` compiles those of a whole run side by side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import attempt

FORMATS: Mapping[str, Mapping[str, Any]] = {
    "humming_w3": {"dtype": "uint3", "group_size": 64, "has_zero_point": True},
    "humming_w4": {"dtype": "uint4", "group_size": 64},
    "humming_w4_g128": {"dtype": "uint4", "group_size": 128},
}
BOUND = 0.45  # relative distance from the unquantised product; 3 bits of a normal distribution give about 0.2


class Need(NamedTuple):
    """A product that will be timed.

    Attributes:
        label: a key of `FORMATS`.
        n: out-features.
        k: in-features.
        experts: 0 for a dense one.
        rows: tokens, or (token, choice) pairs.
    """

    label: str
    n: int
    k: int
    experts: int
    rows: int


class Product:
    """One compressed matrix, or a stack of experts' matrices, from random weights.

    Args:
        label: a key of `FORMATS`.
        n: out-features.
        k: in-features.
        experts: 0 for a dense one.
        dtype: of activations, float16 or bfloat16.
        device: where it lies.
    """

    def __init__(self, label: str, n: int, k: int, experts: int, dtype: torch.dtype, device: torch.device) -> None:
        from humming.layer import HummingLayer

        self._gemm = "indexed" if experts else "dense"
        self._experts = experts
        config = dict(FORMATS[label])
        shape = (experts, n, k) if experts else (n, k)
        weight = torch.randn(shape, device=device, dtype=dtype).mul_(k**-0.5)
        self.layer = HummingLayer(
            shape_n=n, shape_k=k, weight_config=config, num_experts=experts or None, torch_dtype=dtype
        ).to(device)
        self.layer.load_from_unquantized(weight)
        self.layer.transform()
        self._sample = weight.reshape(-1, n, k)[0, :64].float()

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, K]` to `[T, N]`."""
        tuning, _ = tuned(self.layer.humming_config, self._gemm, x.shape[0])
        return self.layer(x, compute_config=_compute(self._gemm), tuning_config=tuning)

    def indexed(self, ids: torch.Tensor, topk: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What multiplies rows with their experts' matrices.

        Args:
            ids: int32, the experts of all pairs, `[pairs / topk, topk]`.
            topk: choices a row of `x`.

        Returns:
            A function of such an `x` that gives `[pairs, N]`, in the order of `ids`.
        """
        from humming.testing.data import generate_moe_tensors

        pairs = ids.numel()
        tuning, block = tuned(self.layer.humming_config, self._gemm, pairs)
        _, _, order, experts, padded = generate_moe_tensors(ids.view(-1, topk), self._experts, self._gemm, block)

        def call(x: torch.Tensor) -> torch.Tensor:
            return self.layer(
                x,
                sorted_ids=order,
                expert_ids=experts,
                num_tokens_padded=padded,
                top_k=topk,
                compute_config=_compute(self._gemm),
                tuning_config=tuning,
                valid_shape_m=pairs,
            )

        return call

    def check(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Compare results of the first matrix with the unquantised product, `[rows, K]` and `[rows, N]`.

        Raises:
            ValueError: they are not each other's, so this is no call to time.
        """
        expected = x.float() @ self._sample.T
        distance = float((y[:, :64].float() - expected).norm() / expected.norm())
        if not distance < BOUND:
            raise ValueError(f"Humming's product is off by {distance:.2f} of its norm")


def tuned(config: Any, gemm: str, rows: int) -> tuple[str, int]:
    """Humming's own choice of a kernel for so many rows, as JSON, and how many rows a block of it takes."""
    from humming.tune import get_heuristics_config

    choice = get_heuristics_config(layer_config=config, shape_m=rows, gemm_type=gemm)
    return json.dumps(choice), choice["block_shape"][0]


def _compute(gemm: str) -> str:
    return json.dumps({"gemm_type": gemm})


def compile_ahead(needs: Sequence[Need], dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels of these products side by side; what fails is compiled, or fails, when it is called."""
    if needs:
        find_compiler()
        attempt("compiling Humming's kernels", lambda: _compile(needs, dtype, device))


def _compile(needs: Sequence[Need], dtype: torch.dtype, device: torch.device) -> None:
    from humming.kernel import HummingKernel
    from humming.schema import BaseWeightSchema
    from humming.transform import prepare_layer_config

    jobs = set()
    for label, n, k, experts, rows in needs:
        schema = BaseWeightSchema.from_config({"quant_method": "humming", **FORMATS[label]})
        config = prepare_layer_config(n, k, schema, num_experts=experts or None, torch_dtype=dtype)
        gemm = "indexed" if experts else "dense"
        jobs.add((config.to_str(), _compute(gemm), tuned(config, gemm, rows)[0]))
    first, *others = sorted(jobs)
    HummingKernel.prepare_kernels(*first, device)  # alone: it loads Humming's launcher
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # the compiler is a process of its own
        labels = {need.label for need in needs}
        small = [pool.submit(Product, label, 512, 512, 2, dtype, device) for label in labels]
        list(pool.map(lambda job: HummingKernel.prepare_kernels(*job, device), others))
        for each in small:  # quantising and packing have kernels too
            each.result()


def find_compiler() -> None:
    """Let Humming's compiler, a process of its own, find the libraries of NVRTC that came with PyTorch."""
    folder = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "lib"
    known = os.environ.get("LD_LIBRARY_PATH", "")
    if folder.is_dir() and str(folder) not in known.split(":"):
        os.environ["LD_LIBRARY_PATH"] = f"{folder}:{known}" if known else str(folder)
