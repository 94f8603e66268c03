"""The solver on a CUDA device: its kernels against PyTorch on the CPU, the whole likewise, twice the same bits."""

from __future__ import annotations

import pytest
import torch

import solver_checks
from milo.format.matrix import Encoding
from milo.kernels.solver import calls
from milo.solve.alternate import alternate
from milo.solve.grid import Grid
from milo.solve.half_quadratic import hqq_grid
from milo.solve.lowrank import fit_lowrank
from milo.solve.stack import solve_stack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Student-t weights with three degrees of freedom."""
    generator = torch.Generator("cuda").manual_seed(seed)
    normal = torch.randn(shape, generator=generator, device="cuda")
    chi = sum(torch.randn(shape, generator=generator, device="cuda").square() for _ in range(3))
    return 0.02 * normal / (chi / 3).sqrt()


def test_triton_serves_this_device() -> None:
    assert calls.usable(torch.zeros(1, device="cuda"))


def test_every_kernel_agrees_with_pytorch_on_the_cpu() -> None:
    solver_checks.run("cuda", 4)  # every variant is compiled: all of them would take a minute


@pytest.mark.parametrize("shape", [(1, 1000, 1024), (3, 257, 333)])
def test_large_and_ragged_stacks_agree_with_the_cpu(shape: tuple[int, int, int]) -> None:
    weight = heavy_tailed(*shape)
    on_gpu, on_cpu = hqq_grid(weight, Encoding()), hqq_grid(weight.cpu(), Encoding())
    assert (on_gpu.scale.cpu() == on_cpu.scale).double().mean() > 0.999
    assert (on_gpu.zero.cpu() == on_cpu.zero).double().mean() > 0.98
    for gpu, cpu in zip(
        solve_stack(weight, [0] * shape[0], Encoding()),
        solve_stack(weight.cpu(), [0] * shape[0], Encoding()),
        strict=True,
    ):
        assert gpu.error == pytest.approx(cpu.error, rel=1e-4)


@pytest.mark.parametrize("ranks", [[16, 16, 16], [5, 64, 200]])
def test_the_alternation_is_as_good_as_on_the_cpu(ranks: list[int]) -> None:
    weight = heavy_tailed(3, 384, 512)
    on_gpu, on_cpu = (solve_stack(w, ranks, Encoding(), rounds=20) for w in (weight, weight.cpu()))
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        assert gpu.error_unrounded == pytest.approx(cpu.error_unrounded, rel=0.015)
        assert gpu.error == pytest.approx(cpu.error, rel=0.015)


@pytest.mark.parametrize("ranks", [[0, 0], [8, 8], [40, 100], [256, 256]])
def test_two_runs_give_the_same_bits(ranks: list[int]) -> None:
    weight = heavy_tailed(2, 256, 512, seed=3)
    first, second = (solve_stack(weight, ranks, Encoding(), rounds=8) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.error, a.error_unrounded) == (b.error, b.error_unrounded)
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize(
    ("rank", "members", "least"), [(16, 1, 0.9), (100, 3, 0.93), (300, 2, 0.95), (500, 1, 0.97), (1024, 1, 0.99)]
)
def test_the_fit_captures_the_energy_of_the_exact_svd(rank: int, members: int, least: float) -> None:
    """At ranks where a float32 Gram matrix is large; bfloat16 products change nothing that matters."""
    residual = heavy_tailed(members, 2048, 1536, seed=4).clamp(-0.1, 0.1)
    exact = torch.linalg.svdvals(residual.double())[:, :rank].square().sum()
    ranks, basis = torch.tensor([rank] * members, device="cuda"), None
    for _ in range(3):
        fit = fit_lowrank(residual.bfloat16(), ranks, rank, basis)
        basis = fit.basis
    gone = (
        residual.double().square().sum() - (residual.double() - fit.left.double() @ fit.right.double()).square().sum()
    )
    assert gone > least * exact
    assert fit.energy.sum().item() == pytest.approx(gone.item(), rel=1e-3)


def test_the_rounds_never_wait_for_the_device() -> None:
    """From the second round on PyTorch raises at a host sync (the first copies the ranks and may compile)."""
    calls_of_search = 0

    def search(target: torch.Tensor, encoding: Encoding) -> Grid:
        nonlocal calls_of_search
        calls_of_search += 1
        if calls_of_search == 2:
            torch.cuda.set_sync_debug_mode("error")
        return hqq_grid(target, encoding)

    try:
        alternate(heavy_tailed(4, 256, 512), [8, 16, 9, 3], search, Encoding(), 12)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls_of_search == 12


def test_peak_memory_is_bounded() -> None:
    """Eight times the stack in bfloat16, plus a slack for what does not grow with it."""
    weight = heavy_tailed(2, 4096, 4096).bfloat16()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - weight.nbytes
    solve_stack(weight, [64, 100], Encoding(), rounds=3)
    assert torch.cuda.max_memory_allocated() - before < 8 * weight.nbytes + 3e8
