"""The solver's kernels against the PyTorch path: the same checks on a GPU and under Triton's interpreter.

`tests/gpu/test_solver.py` runs them on a device; `tests/kernels/test_solver_kernels.py` runs this file as a program,
with the interpreter switched on, on CPU tensors. A disagreement is an AssertionError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from unittest.mock import patch

import torch

from milo.format.codes import pack_words
from milo.format.matrix import Encoding
from milo.kernels.reference import reconstruct
from milo.kernels.solver import calls
from milo.solve import factors, grid, half_quadratic, lowrank
from milo.solve.stack import solve_stack

SHAPES = [(2, 24, 128), (3, 9, 200), (1, 33, 64), (2, 7, 40)]
ENCODINGS = [
    Encoding(),
    Encoding(2, 32),
    Encoding(4, 128),
    Encoding(8, 64),
    Encoding(3, 64, zero_bits=8),
    Encoding(3, 64, 8, 8),
]


def weights(shape: tuple[int, ...], device: str, seed: int = 0, std: float = 0.05) -> torch.Tensor:
    """Normal weights with an outlier, a constant group and a group of zeros in each matrix."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
    weight[:, 1, 3] *= 40
    weight[:, 2, :32] = 0.3 * std
    weight[:, 3, :32] = 0
    return weight.to(device)


def on_cpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.cpu() for t in tensors]


def check_grids(device: str, shape: tuple[int, int, int], encoding: Encoding, std: float) -> None:
    """The min-max grid exactly; half-quadratic zeros but for ties that round the other way."""
    weight = weights(shape, device, std=std)
    start = grid.minmax_grid(weight.cpu(), encoding)
    if encoding.scale_bits == 16:
        scale, zero = on_cpu(*calls.minmax(weight, encoding, grid.MAX_ZERO))
        torch.testing.assert_close(scale, start.scale, rtol=1e-3, atol=0)
        assert (scale == start.scale).double().mean() > 0.99
        assert (zero == start.zero).double().mean() > 0.98
    expected = half_quadratic.half_quadratic(weight.cpu(), start, encoding)
    given = None if encoding.scale_bits == 16 else grid.Grid(start.scale.to(device), start.zero.to(device))
    found = half_quadratic.fused(weight, given, encoding)
    assert (found.scale.cpu() == expected.scale).double().mean() > 0.99
    assert (found.zero.cpu() != expected.zero).sum() <= 3 + 0.02 * expected.zero.numel()
    assert (found.zero.cpu() - expected.zero).abs().mean() < 2e-3 * max(1, expected.zero.abs().mean())
    assert torch.equal(found.zero, half_quadratic.fused(weight, given, encoding).zero)


def check_stop_rule(device: str) -> None:
    """Four bits at this scale: the zeros still move when the error has begun to rise, each matrix at its own step."""
    encoding = Encoding(4, 32)
    weight = torch.cat([weights((1, 24, 128), device, seed, std) for seed, std in ((1, 1.0), (2, 300.0), (3, 0.05))])
    expected = half_quadratic.half_quadratic(weight.cpu(), grid.minmax_grid(weight.cpu(), encoding), encoding)
    same = half_quadratic.fused(weight, None, encoding).zero.cpu() == expected.zero
    assert (same.double().mean((1, 2)) > 0.97).all(), same.double().mean((1, 2))


def check_quantise(device: str, shape: tuple[int, int, int], encoding: Encoding, dtype: torch.dtype | None) -> None:
    weight, target = weights(shape, device), weights(shape, device, seed=1)
    found = grid.minmax_grid(target.cpu(), encoding)
    scale, zero = found.scale.to(device), found.zero.to(device)
    codes, residual, norm = calls.quantise(weight, target, scale, zero, encoding, dtype)
    expected = grid.encode(target.cpu(), found, encoding)
    off = (codes.cpu().int() - expected.int()).abs()
    assert int(off.max()) <= 1
    assert (off > 0).double().mean() < 1e-3
    left = weight.cpu() - grid.decode(codes.cpu(), found, encoding)
    torch.testing.assert_close(norm.cpu(), left.double().norm(dim=(1, 2)), rtol=1e-5, atol=1e-7)
    if dtype is None:
        assert residual is None
    else:
        assert residual.dtype is dtype
        rtol = 2**-6.9 if dtype is torch.bfloat16 else 1e-5  # the interpreter truncates, a GPU rounds
        torch.testing.assert_close(residual.cpu().float(), left, rtol=rtol, atol=1e-6)
    own = calls.quantise(target, target, scale, zero, encoding, None)[2]
    left = target.cpu() - grid.decode(expected, found, encoding)
    torch.testing.assert_close(own.cpu(), left.double().norm(dim=(1, 2)), rtol=1e-3, atol=1e-7)


def check_retarget(device: str, shape: tuple[int, int, int], size: int) -> None:
    weight = weights(shape, device)
    removed = weights(shape, device, seed=2).bfloat16()
    scale = torch.rand(*shape[:2], -(-shape[2] // size)).to(device) + 0.5
    plain = calls.retarget(weight, removed, scale, size, 0.0, 1)
    assert torch.equal(plain, weight - removed.float())
    noisy = calls.retarget(weight, removed, scale, size, 0.4, 1)
    assert torch.equal(noisy, calls.retarget(weight, removed, scale, size, 0.4, 1))
    noise = (noisy - plain) / scale.repeat_interleave(size, -1)[..., : shape[2]]
    assert noise.abs().max() <= 0.2 + 1e-4
    # Uniform, the same for every member, another for another seed.
    values = noise[0].flatten().cpu().double()
    slack = 4 / len(values) ** 0.5
    assert abs(values.mean() / 0.2) < slack
    assert abs(values.var() / (0.4**2 / 12) - 1) < 2 * slack
    assert len(values.unique()) > 0.9 * len(values)
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), rtol=0, atol=1e-4)
    other = calls.retarget(weight, removed, scale, size, 0.4, 2)
    assert (other != noisy).double().mean() > 0.9


def check_round_rows(device: str, bits: int, length: int) -> None:
    rows = torch.randn(2, 5, length, generator=torch.Generator().manual_seed(length))
    rows[0, 1] = 0
    codes, scales = calls.round_rows(rows.to(device), bits, factors.CANDIDATES[bits])
    expected, expected_scales = factors.round_rows(rows, bits)
    ours = (factors.value_of(codes.cpu(), scales.cpu(), bits) - rows).square().sum(-1)
    theirs = (factors.value_of(expected, expected_scales, bits) - rows).square().sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    if length > 1:  # several scales represent a lone number equally well, and a fused multiply-add decides among them
        assert (codes.cpu() == expected).double().mean() > 0.98


def check_whitener(device: str, width: int) -> None:
    """The inverse Cholesky factor of LAPACK; a column of zeros gives a row of zeros, dependent ones nothing wild."""
    columns = torch.randn(3, 200, width, generator=torch.Generator().manual_seed(width))
    columns[1] *= torch.linspace(1, 1e-3, width)
    columns[2, :, width // 2] = 0
    gram = columns.mT @ columns
    for unit in (False, True):
        length = torch.linalg.vector_norm(columns, dim=1) if unit else torch.ones(3, width)
        scale = torch.where(length > 0, 1 / length, 0.0)
        wanted = (gram * scale[:, None] * scale[..., None]).double()
        wanted.diagonal(dim1=-2, dim2=-1).add_(1e-4)
        root = torch.linalg.cholesky(wanted)
        inverse = torch.linalg.solve_triangular(root, torch.eye(width).double().expand_as(root), upper=False)
        expected = (inverse * scale[:, None]).mT.float()
        found = calls.whitener(gram.to(device), 1e-4, unit).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * expected.abs().max().item())
    lone = torch.ones(1, 200, width)  # all columns the same: its Gram matrix has rank 1
    found = calls.whitener((lone.mT @ lone).to(device), 1e-4, True).cpu()
    assert torch.linalg.matrix_norm(lone @ found, 2) <= 1 + 1e-3


def check_orthonormal(device: str, width: int, widest: int) -> None:
    """`_orthonormal` through the kernel, whole or in blocks, spans what it should with orthonormal columns."""
    columns = torch.randn(2, 300, width, generator=torch.Generator().manual_seed(width))
    columns *= torch.linspace(1, 0.05, width)
    with patch.object(calls, "usable", return_value=True), patch.object(calls, "WIDEST", widest):
        for steps in (1, 2):  # a step bears a condition of about 100
            found = lowrank._orthonormal(columns.to(device), steps).cpu().double()
            unit = torch.eye(width).double()
            assert (found.mT @ found - unit).abs().max() < 1e-4
            expected = torch.linalg.qr(columns.double()).Q
            assert (expected.mT @ found).square().sum((1, 2)).sub(width).abs().max() < 1e-3 * width


def check_pack(device: str, bits: int, length: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, length), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    assert torch.equal(calls.pack_words(codes.to(device), bits).cpu(), pack_words(codes, bits))


def check_stack(device: str, ranks: list[int], encoding: Encoding, grid_name: str) -> None:
    """The whole solver: as good through the kernels as through PyTorch, and the error it reports is the true one."""
    weight = weights((len(ranks), 24, 64), "cpu", seed=5)
    expected = solve_stack(weight, ranks, encoding, grid_name, rounds=3)
    with patch.object(calls, "usable", return_value=True):  # on a GPU it is so anyway
        found = solve_stack(weight.to(device), ranks, encoding, grid_name, rounds=3)
    for rank, one, other, matrix in zip(ranks, found, expected, weight, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert all(t.shape == other.tensors[name].shape for name, t in one.tensors.items())
        assert all(t.dtype == other.tensors[name].dtype for name, t in one.tensors.items())
        rebuilt = reconstruct({name: t.cpu() for name, t in one.tensors.items()}, encoding, (24, 64)).double()
        error = ((matrix.double() - rebuilt).norm() / matrix.double().norm()).item()
        assert abs(one.error - error) <= 2e-3 * error, (one.error, error)
        # Ranks above 0 take another path through the noise, which is another draw.
        assert abs(one.error - other.error) <= (0.03 if rank else 1e-3) * other.error, (rank, one.error, other.error)


def run(device: str, thin: int = 1) -> None:
    """All checks, or every `thin`-th of them and the last six, which cover the most."""
    pairs = list(product(SHAPES, ENCODINGS))
    checks: list[Callable[[], None]] = [
        *(partial(check_grids, device, s, e, std) for std in (0.05, 2.0) for s, e in pairs),
        *(partial(check_quantise, device, s, e, d) for d in (None, torch.float32, torch.bfloat16) for s, e in pairs),
        *(partial(check_retarget, device, shape, size) for shape in SHAPES for size in (32, 64, 128)),
        *(partial(check_round_rows, device, bits, length) for bits in (3, 8) for length in (1, 63, 64, 65, 200)),
        *(partial(check_whitener, device, width) for width in (1, 5, 64, 65, 128)),
        *(partial(check_pack, device, bits, length) for bits in (1, 2, 3, 4) for length in (1, 63, 64, 65, 200)),
        partial(check_stop_rule, device),
        partial(check_orthonormal, device, 24, 128),
        partial(check_orthonormal, device, 23, 10),
        partial(check_stack, device, [0, 3, 6, 24], Encoding(), "rtn"),
        partial(check_stack, device, [0, 0, 0], Encoding(6, 32, 8, 8, "int8"), "hqq"),
        partial(check_stack, device, [0, 3, 6, 24], Encoding(), "hqq"),
    ]
    chosen = checks[:-6:thin] + checks[-6:]
    for check in chosen:
        check()
    print(f"{len(chosen)} checks passed on {device}")


if __name__ == "__main__":
    run("cpu", int(sys.argv[1]))
