"""MiLo's alternation: the paper's stop rule, the best round kept, noise that beats the plain loop."""

from __future__ import annotations

import pytest
import torch

from milo.format.matrix import Encoding
from milo.solve.alternate import TOLERANCE, WINDOW, _settled, alternate
from milo.solve.grid import Grid, decode, encode, minmax_grid
from milo.solve.half_quadratic import half_quadratic
from milo.solve.lowrank import fit_lowrank

ENCODING = Encoding()


def hqq(target: torch.Tensor, encoding: Encoding) -> Grid:
    return half_quadratic(target, minmax_grid(target, encoding), encoding)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def plain_errors(weight: torch.Tensor, rank: int, rounds: int) -> list[float]:
    """Algorithm 1 written out for one matrix: the error of every round, without any stop rule."""
    product, basis, errors = torch.zeros_like(weight), None, []
    for _ in range(rounds):
        grid = hqq(weight - product, ENCODING)
        residual = weight - decode(encode(weight - product, grid, ENCODING), grid, ENCODING)
        fit = fit_lowrank(residual, torch.tensor([rank]), rank, basis)
        product, basis = fit.left @ fit.right, fit.basis
        errors.append((residual - product).norm().item())
    return errors


def stop_round(errors: list[float]) -> int:
    """Eq. 15 by hand: the first round whose 3-round mean improves by less than 1e-4 on the one before."""
    for t in range(4, len(errors) + 1):
        now, before = sum(errors[t - 3 : t]) / 3, sum(errors[t - 4 : t - 1]) / 3
        if (before - now) / before < 1e-4:
            return t
    return len(errors)


@pytest.mark.parametrize(("shape", "rank"), [((96, 128), 8), ((128, 64), 40), ((64, 70), 3)])
def test_the_plain_loop_stops_by_the_papers_rule_and_keeps_the_best_round(shape: tuple[int, int], rank: int) -> None:
    weight = normal(1, *shape)
    errors = plain_errors(weight, rank, 120)
    expected = stop_round(errors)
    assert 4 <= expected < 120
    found = alternate(weight, [rank], hqq, ENCODING, 120, dither=0)
    assert found.rounds.tolist() == [expected]
    assert found.error.item() == pytest.approx(min(errors[:expected]), rel=1e-4)


@pytest.mark.parametrize("dither", [0.0, 0.4])
def test_the_kept_error_is_that_of_the_kept_codes_and_factors(dither: float) -> None:
    weight = normal(2, 96, 128)
    found = alternate(weight, [8, 5], hqq, ENCODING, 9, dither=dither)
    rebuilt = decode(found.codes, found.grid, ENCODING) + found.fit.left @ found.fit.right
    torch.testing.assert_close((weight - rebuilt).norm(dim=(1, 2)).double(), found.error, rtol=1e-4, atol=0)


def test_more_rounds_never_keep_a_worse_result() -> None:
    weight = normal(1, 96, 128)
    errors = [alternate(weight, [8], hqq, ENCODING, n, dither=0).error.item() for n in range(1, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_noise_beats_the_plain_loop_at_21_rounds() -> None:
    weight = normal(2, 256, 256)
    noisy = alternate(weight, [16, 48], hqq, ENCODING, 21)
    plain = alternate(weight, [16, 48], hqq, ENCODING, 21, dither=0)
    assert (noisy.error < 0.99 * plain.error).all()


def test_the_noise_fades_before_the_last_round() -> None:
    """The last tenth of the rounds is noiseless, so that the kept round fits the weight and not the noise."""
    weight = normal(1, 96, 128)
    targets = []

    def spy(target: torch.Tensor, encoding: Encoding) -> Grid:
        targets.append(target.clone())
        return hqq(target, encoding)

    alternate(weight, [8], spy, ENCODING, 20)
    # `W − target` is U·V, of rank 8, plus the noise, which is not of low rank.
    noise = [torch.linalg.svdvals(weight[0] - target[0])[8:].norm().item() for target in targets[1:]]
    assert noise[:17] == sorted(noise[:17], reverse=True)
    assert noise[16] > 0.01
    assert max(noise[18:]) < 1e-5


def test_one_round_is_one_solve() -> None:
    weight = normal(1, 96, 128)
    found = alternate(weight, [8], hqq, ENCODING, 1)
    assert found.rounds.tolist() == [1]
    assert found.error.item() == pytest.approx(plain_errors(weight, 8, 1)[0], rel=1e-4)


def test_a_matrix_that_has_settled_does_not_hold_up_or_end_the_others() -> None:
    """A matrix that is exact at once stops first; its neighbour goes on as if alone."""
    hard = normal(96, 128)
    exact = torch.zeros(96, 128)
    found = alternate(torch.stack([exact, hard]), [8, 8], hqq, ENCODING, 60, dither=0)
    alone = alternate(hard[None], [8], hqq, ENCODING, 60, dither=0)
    assert found.rounds[0] == WINDOW + 1
    assert found.rounds[1] > found.rounds[0]
    assert found.error[0] == 0
    assert found.error[1].item() == pytest.approx(alone.error.item(), rel=2e-3)


def test_factors_beyond_a_members_own_rank_are_zero() -> None:
    found = alternate(normal(3, 64, 96), [2, 5, 3], hqq, ENCODING, 4)
    for member, rank in enumerate([2, 5, 3]):
        assert found.fit.left[member, :, :rank].abs().sum(0).min() > 0
        assert not found.fit.left[member, :, rank:].any()
        assert not found.fit.right[member, rank:].any()


def settled(*errors: float) -> bool:
    return bool(_settled([torch.tensor([e], dtype=torch.float64) for e in errors])[0])


def test_eq_15_needs_two_windows_and_ends_on_standstill_and_divergence() -> None:
    assert (WINDOW, TOLERANCE) == (3, 1e-4)
    assert not settled(1, 1, 1)
    assert settled(1, 1, 1, 1)
    assert settled(1, 1.1, 1.2, 1.3)
    assert not settled(1.03, 1.02, 1.01, 1.0)
    assert settled(1.00003, 1.00002, 1.00001, 1.0)
    # The mean counts, not the last step: a jump up within a falling window does not end it.
    assert not settled(1.5, 1.2, 1.0, 1.05)
