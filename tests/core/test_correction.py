"""What forecasts got wrong is made good at the next computed evaluation."""
import pytest
import torch

from fastercache_core.clock import Clock
from fastercache_core.correction import SOLVERS, Correction, step_weights
from fastercache_core.forecast import FORECASTS, History

STEPS = 30


def sample(solver, skip, slope, wrong, corrected=True):
    """The latent at the end of a run; slope(sigma) is misjudged by `wrong` at `skip`, then made good."""
    history, correction, one = History(FORECASTS["quadratic"]), Correction(solver), torch.ones(1, 1)
    clock, x, last = Clock([(1 - i / STEPS) ** 1.3 for i in range(STEPS + 1)]), one, (None, 0.0)
    for sigma in clock.grid:
        evaluation = clock.tick(sigma)
        value = (slope(sigma) + wrong * (evaluation.ordinal in skip)) * one
        if evaluation.ordinal in skip:
            shift = correction.forecast(evaluation, value, -sigma * one)
        else:
            history.push(sigma, (value,))
            shift = correction.settle(evaluation, history, -sigma * one)
        denoised = x - sigma * (value + shift if corrected and shift is not None else value)
        following = sigma - evaluation.step
        weight, before = step_weights(solver, last[0], sigma, following)
        x, last = x * (following / sigma) + weight * denoised + before * last[1], (sigma, denoised)
    return x.item()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("skip", [range(5, 29, 2), [i for i in range(5, 29) if i % 3], [7, 8, 9, 12]])
def test_however_wrong_a_forecast_was_most_of_it_is_made_good(solver, skip):
    slope = lambda sigma: 1 - 2 * sigma + 3 * sigma ** 2  # what interpolation knows exactly
    full = sample(solver, (), slope, 0.0)
    left = sample(solver, skip, slope, 5.0) - full
    assert abs(left) < 0.25 * abs(sample(solver, skip, slope, 5.0, corrected=False) - full)


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_nothing_skipped_there_is_nothing_to_make_good(solver):
    correction, clock = Correction(solver), Clock([0.9, 0.8, 0.7, 0.0])
    assert [correction.settle(clock.tick(s), None, None) for s in (0.9, 0.8, 0.7)] == [None] * 3


def test_of_an_error_half_shrinks_with_the_noise_level():
    history, correction, one = History(FORECASTS["linear"]), Correction(), torch.ones(1, 1)
    clock = Clock([0.9, 0.8, 0.7, 0.4, 0.0])
    first, skipped, computed, _ = (clock.tick(s) for s in (0.9, 0.8, 0.7, 0.4))
    history.push(first.sigma, (one,))
    assert correction.forecast(skipped, 3 * one, one) is None
    history.push(computed.sigma, (one,))
    shift = correction.settle(computed, history, one).item()
    weight, own = 1 - 0.7 / 0.8, 1 - 0.4 / 0.7
    assert shift == pytest.approx(-2 * weight / own * (0.5 + 0.5 * 0.4 / 0.7), rel=1e-4)


def test_what_was_added_for_one_step_is_taken_back_where_the_solver_uses_it_again():
    history, correction, one = History(FORECASTS["linear"]), Correction("dpmpp_2m"), torch.ones(1, 1)
    clock = Clock([0.9, 0.8, 0.7, 0.5, 0.3, 0.0])
    first, skipped, computed, after, last = map(clock.tick, clock.grid)
    history.push(first.sigma, (one,))
    correction.settle(first, history, one)
    correction.forecast(skipped, 3 * one, one)
    history.push(computed.sigma, (one,))
    added = correction.settle(computed, history, one).item()
    history.push(after.sigma, (one,))
    back = correction.settle(after, history, one).item()
    weight, before = step_weights("dpmpp_2m", 0.7, 0.5, 0.3)
    assert added and before < 0 and back == pytest.approx(-added * before / weight, rel=1e-4)
    assert correction.settle(last, history, one) is None, "a solver's last step looks back no more"
    correction.clear()
    assert correction.tensors() == []
