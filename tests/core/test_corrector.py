"""What forecasts got wrong is taken back at the next computed evaluation."""

import math
from collections.abc import Callable, Iterable

import pytest
import torch

from fastercache_core.clock import Clock
from fastercache_core.corrector import Corrector
from fastercache_core.forecast import ORDERS, Polynomial
from fastercache_core.solvers import SOLVERS
from support import grids

STEPS = 30
CORRECTED = [name for name, solver in SOLVERS.items() if solver.corrects]
ONE = torch.ones(1, 1)


def sample(
    name: str, skip: Iterable[int], slope: Callable[[float], float], wrong: float, corrected: bool = True
) -> float:
    """The latent at the end of a run; slope(sigma) is predicted wrong by `wrong` at `skip`, then corrected."""
    solver, forecaster = SOLVERS[name], Polynomial(ORDERS["quadratic"])
    corrector = Corrector(solver)
    clock, x, last = Clock([(1 - i / STEPS) ** 1.3 for i in range(STEPS + 1)]), ONE, (None, 0.0)
    for sigma in clock.grid:
        evaluation = clock.tick(sigma)
        value = (slope(sigma) + wrong * (evaluation.ordinal in skip)) * ONE
        if evaluation.ordinal in skip:
            shift = corrector.predicted(evaluation, value, -sigma * ONE)
        else:
            forecaster.observe(sigma, value)
            shift = corrector.computed(evaluation, forecaster, -sigma * ONE)
        denoised = x - sigma * (value + shift if corrected and shift is not None else value)
        following = sigma - evaluation.step
        weight, before = solver.step_weights(last[0], sigma, following)
        x, last = x * (following / sigma) + weight * denoised + before * last[1], (sigma, denoised)
    return x.item()


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("skip", [range(5, 29, 2), [i for i in range(5, 29) if i % 3], [7, 8, 9, 12]])
def test_however_wrong_a_forecast_was_most_of_it_is_corrected(name: str, skip: Iterable[int]) -> None:
    slope = lambda sigma: 1 - 2 * sigma + 3 * sigma**2  # what interpolation knows exactly
    full = sample(name, (), slope, 0.0)
    left = sample(name, skip, slope, 5.0) - full
    assert abs(left) < 0.25 * abs(sample(name, skip, slope, 5.0, corrected=False) - full)


@pytest.mark.parametrize("name", CORRECTED)
def test_with_nothing_skipped_there_is_nothing_to_correct(name: str) -> None:
    corrector, forecaster = Corrector(SOLVERS[name]), Polynomial(ORDERS["hold"])
    clock, shifts = Clock([0.9, 0.8, 0.7, 0.0]), []
    for sigma in clock.grid:
        forecaster.observe(sigma, ONE)
        shifts.append(corrector.computed(clock.tick(sigma), forecaster, ONE))
    assert shifts == [None] * 3 and corrector.tensors() == []


@pytest.mark.parametrize("name", CORRECTED)
def test_a_forecast_that_was_right_is_left_alone(name: str) -> None:
    corrector, forecaster = Corrector(SOLVERS[name]), Polynomial(ORDERS["linear"])
    first, skipped, computed = map(Clock([0.9, 0.8, 0.7, 0.5, 0.0]).tick, (0.9, 0.8, 0.7))
    forecaster.observe(first.sigma, 0.9 * ONE)
    corrector.computed(first, forecaster, ONE)
    assert corrector.predicted(skipped, 0.8 * ONE, ONE) is None
    forecaster.observe(computed.sigma, 0.7 * ONE)
    shift = corrector.computed(computed, forecaster, ONE)
    assert shift is not None and shift.item() == pytest.approx(0.0, abs=1e-6)


def test_of_an_error_half_shrinks_with_the_noise_level() -> None:
    forecaster, corrector = Polynomial(ORDERS["linear"]), Corrector(SOLVERS["sample_euler"])
    first, skipped, computed = map(Clock([0.9, 0.8, 0.7, 0.4, 0.0]).tick, (0.9, 0.8, 0.7))
    forecaster.observe(first.sigma, ONE)
    assert corrector.predicted(skipped, 3 * ONE, ONE) is None
    forecaster.observe(computed.sigma, ONE)
    shift = corrector.computed(computed, forecaster, ONE)
    weight, own = 1 - 0.7 / 0.8, 1 - 0.4 / 0.7
    assert shift is not None
    assert shift.item() == pytest.approx(-2 * weight / own * (0.5 + 0.5 * 0.4 / 0.7), rel=1e-4)


def test_what_was_added_for_one_step_is_taken_back_where_the_solver_uses_it_again() -> None:
    solver, forecaster = SOLVERS["sample_dpmpp_2m"], Polynomial(ORDERS["linear"])
    corrector, clock = Corrector(solver), Clock([0.9, 0.8, 0.7, 0.5, 0.3, 0.0])
    first, skipped, computed, after, last = map(clock.tick, clock.grid)
    forecaster.observe(first.sigma, ONE)
    corrector.computed(first, forecaster, ONE)
    corrector.predicted(skipped, 3 * ONE, ONE)
    assert len(corrector.tensors()) == 1, "the forecast, until it can be compared"
    forecaster.observe(computed.sigma, ONE)
    added = corrector.computed(computed, forecaster, ONE)
    forecaster.observe(after.sigma, ONE)
    back = corrector.computed(after, forecaster, ONE)
    weight, before = solver.step_weights(0.7, 0.5, 0.3)
    assert added is not None and back is not None and before < 0
    assert back.item() == pytest.approx(-added.item() * before / weight, rel=1e-4)
    forecaster.observe(last.sigma, ONE)
    assert corrector.computed(last, forecaster, ONE) is None, "a solver's last step looks back no more"
    assert corrector.tensors() == []


def test_a_step_far_smaller_than_the_predicted_one_corrects_nothing() -> None:
    """It would take a value as many times larger, which a solver of second order then uses again."""
    corrector, forecaster = Corrector(SOLVERS["sample_euler"]), Polynomial(ORDERS["linear"])
    first, skipped, computed = map(Clock([0.9, 0.8, 0.7, 0.7 - 1e-6, 0.5, 0.0]).tick, (0.9, 0.8, 0.7))
    forecaster.observe(first.sigma, ONE)
    corrector.predicted(skipped, 3 * ONE, ONE)
    forecaster.observe(computed.sigma, ONE)
    assert corrector.computed(computed, forecaster, ONE) is None and corrector.tensors() == []


UNUSUAL = {
    "repeated": [0.9, 0.8, 0.8, 0.8, 0.6, 0.6, 0.3, 0.3, 0.0],
    "zero in the middle": [0.9, 0.6, 0.3, 0.0, 0.8, 0.5, 0.2, 0.0],
    "rising": [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9],
    "dense": grids.linear_quadratic(60),
}


@pytest.mark.parametrize("gap", [2, 3, 4])
@pytest.mark.parametrize("grid", UNUSUAL)
@pytest.mark.parametrize("name", CORRECTED)
def test_unusual_sigmas_give_finite_corrections(name: str, grid: str, gap: int) -> None:
    corrector, forecaster = Corrector(SOLVERS[name]), Polynomial(ORDERS["quadratic"])
    clock = Clock(UNUSUAL[grid])
    for sigma in clock.grid:
        evaluation, scale = clock.tick(sigma), -max(sigma, 1e-3) * ONE
        if evaluation.ordinal % gap:
            shift = corrector.predicted(evaluation, 3 * ONE, scale)
        else:
            forecaster.observe(sigma, math.cos(3 * sigma) * ONE)
            shift = corrector.computed(evaluation, forecaster, scale)
        assert shift is None or shift.isfinite().all()
        assert shift is None or shift.abs().max() < 1e3
