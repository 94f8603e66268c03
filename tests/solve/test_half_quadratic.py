"""The half-quadratic step against a plain transcription of HQQ's legacy loop (Eq. 5-8 of the paper).

Ours is one fused update in units of codes; the transcription below keeps the auxiliary variable M, works in
units of weights and knows no blocks, so that an error of algebra shows. The shrink only bites where errors
exceed (s^{p−2}/β)^{1/(2−p)} codes, about 0.17/s: never at the scales of real weights, always at scales near 1.
Both sides of that border are tested.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from milo.format.matrix import Encoding
from milo.solve import half_quadratic as module
from milo.solve.grid import Grid, decode, encode, minmax_grid
from milo.solve.half_quadratic import half_quadratic


def transcription(weight: torch.Tensor, grid: Grid, encoding: Encoding) -> tuple[torch.Tensor, int, int]:
    """HQQ's `optimize_weights_proximal_legacy` for one matrix, in float64.

    Returns the zeros, the iterations that ran, and in how many the shrink left more than nothing.
    """
    p, beta, kappa = 0.7, 10.0, 1.01
    size, (n, k) = encoding.group_size, weight.shape
    groups = -(-k // size)
    w = torch.full((n, groups * size), torch.nan, dtype=torch.float64)
    w[:, :k] = weight
    w = w.reshape(n, groups, size)
    real = ~torch.isnan(w)
    s, z = grid.scale[0].double()[..., None], grid.zero[0].double()[..., None]
    best, biting, iterations = float("inf"), 0, 0
    while iterations < 20:
        iterations += 1
        codes = torch.round(w / s + z).clamp(0, encoding.max_code)
        error = w - s * (codes - z)
        magnitude = error.abs()
        m = torch.sign(error) * torch.relu(magnitude - magnitude.pow(p - 1) / beta)  # Eq. 6-7
        m = torch.where(magnitude == 0, 0.0, m)
        biting += bool((m[real] != 0).any())
        z = torch.nanmean(codes - (w - m) / s, dim=-1, keepdim=True)  # Eq. 8
        beta *= kappa
        mean = magnitude[real].mean().item()
        if mean >= best:
            break
        best = mean
    return z[..., 0], iterations, biting


def check(weight: torch.Tensor, encoding: Encoding) -> int:
    """Zeros agree but for a tie here and there that rounds the other way; says how often the shrink was active."""
    grid = minmax_grid(weight[None], encoding)
    found = half_quadratic(weight[None], grid, encoding)
    assert torch.equal(found.scale, grid.scale)
    expected, _, biting = transcription(weight, grid, encoding)
    assert (found.zero[0].half() == expected.half()).double().mean() >= 0.99  # one step more or less would show
    assert (found.zero[0] - expected).abs().mean() < 2e-3 * max(1, expected.abs().mean())
    moved = (grid.zero[0].double() - expected).abs().max()  # by so much a step that does nothing would miss
    assert moved > (0.02 if weight.abs().max() < 50 else 0)
    return biting


def normal(shape: tuple[int, int], std: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize("shape", [(96, 128), (33, 192), (40, 70), (64, 40)])
def test_zeros_are_hqqs_at_the_scale_of_real_weights_ragged_groups_included(shape: tuple[int, int]) -> None:
    assert check(normal(shape, 0.05), Encoding()) == 0


@pytest.mark.parametrize("std", [1.0, 5.0, 200.0])
@pytest.mark.parametrize("shape", [(96, 128), (40, 70)])
def test_zeros_are_hqqs_where_the_shrink_is_active(shape: tuple[int, int], std: float) -> None:
    assert check(normal(shape, std), Encoding()) > 0


@pytest.mark.parametrize("shape", [(96, 128), (40, 70)])
def test_it_stops_when_hqq_stops(shape: tuple[int, int]) -> None:
    """With four bits at this scale the zeros still move when the error has begun to rise; elsewhere they stand."""
    weight, encoding = normal(shape, 1.0), Encoding(4, 32)
    assert transcription(weight, minmax_grid(weight[None], encoding), encoding)[1] < 20
    check(weight, encoding)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [32, 128])
def test_zeros_are_hqqs_for_other_widths_and_groups(bits: int, size: int) -> None:
    check(normal((64, 200), 0.5, seed=bits), Encoding(bits, size))


def test_scales_that_differ_by_orders_of_magnitude_do_not_disturb_each_other() -> None:
    """The shrink is applied to the few groups that need it; their neighbours must not notice."""
    weight = normal((64, 256), 0.01)
    weight[::7] *= 400
    check(weight, Encoding())


def test_a_matrix_stops_by_itself_whatever_its_neighbours_in_the_stack_do() -> None:
    easy = normal((64, 128), 0.05)
    stack = torch.stack([easy, normal((64, 128), 300.0, seed=1), easy * 0.5])
    encoding = Encoding()
    together = half_quadratic(stack, minmax_grid(stack, encoding), encoding)
    for i, weight in enumerate(stack):
        alone = half_quadratic(weight[None], minmax_grid(weight[None], encoding), encoding)
        assert torch.equal(together.zero[i], alone.zero[0])
    iterations = {transcription(w, minmax_grid(w[None], encoding), encoding)[1] for w in stack}
    assert len(iterations) > 1  # they did stop at different times


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal((50, 128), 0.05)[None]
    encoding = Encoding()
    whole = half_quadratic(weight, minmax_grid(weight, encoding), encoding)
    monkeypatch.setattr(module, "_CPU_BLOCK", 7 * 128)
    blocks = half_quadratic(weight, minmax_grid(weight, encoding), encoding)
    torch.testing.assert_close(blocks.zero, whole.zero, rtol=0, atol=1e-6)


def test_all_matrices_at_once_as_on_a_gpu_give_the_same_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the stack is one block, and matrices that have stopped are masked instead of skipped."""
    easy = normal((64, 128), 0.05)
    stack = torch.stack([easy, normal((64, 128), 300.0, seed=1), easy * 0.5])
    encoding = Encoding()
    grid = minmax_grid(stack, encoding)
    apart = half_quadratic(stack, grid, encoding)
    blocks = module._blocks

    def whole(stack: int, rows: int, width: int, active: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        return blocks(stack, rows, width, active.to("meta"))

    monkeypatch.setattr(module, "_blocks", whole)
    torch.testing.assert_close(half_quadratic(stack, grid, encoding).zero, apart.zero, rtol=0, atol=1e-6)


def test_it_improves_on_rounding_to_nearest() -> None:
    weight = normal((128, 256), 0.05)[None]
    for encoding in (Encoding(), Encoding(zero_bits=8, scale_bits=8), Encoding(2, 32)):
        start = minmax_grid(weight, encoding)
        found = half_quadratic(weight, start, encoding)
        before, after = (
            (weight - decode(encode(weight, grid, encoding), grid, encoding)).norm() for grid in (start, found)
        )
        assert after < before


def test_constant_groups_and_zeros_are_left_alone() -> None:
    weight = torch.zeros(1, 40, 128)
    weight[:, 7] = 0.25
    encoding = Encoding()
    found = half_quadratic(weight, minmax_grid(weight, encoding), encoding)
    assert torch.equal(decode(encode(weight, found, encoding), found, encoding), weight)
