"""The automatic mode: skips as much as the wanted closeness allows, keeps its rhythm, makes errors good."""
import math

import pytest
import torch

from fastercache_core.auto import AutoSettings, Rhythm
from fastercache_core.clock import Clock, Window
from fastercache_core.correction import Correction
from fastercache_core.forecast import FORECASTS, History

STEPS = 30


def sample(rate, closeness=42.0, corrected=True, steps=STEPS, **settings):
    """Which evaluations of a run with even sigmas are skipped, as "F" and "-"; rate(ordinal) in steps."""
    rhythm = Rhythm(AutoSettings(closeness, **settings), lambda percent: 1 - percent, corrected)
    clock, done = Clock([1 - i / steps for i in range(steps + 1)]), ""
    for ordinal in range(steps):
        evaluation = clock.tick(1 - ordinal / steps)
        known = ordinal >= 4
        if known and rhythm.may_skip(evaluation, [rate(ordinal) * steps ** 3]):
            done += "-"
        else:
            rhythm.computed(evaluation)
            done += "F"
    return done


def gaps(done):
    """Lengths of the gaps, in order."""
    ends = [i for i, action in enumerate(done) if action == "F"]
    return [b - a for a, b in zip(ends, ends[1:])]


def cost(done):
    return done.count("F") / len(done)


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 3e-3])
def test_the_closer_the_picture_must_be_the_more_is_computed(rate):
    costs = [cost(sample(lambda _: rate, closeness)) for closeness in (35, 40, 45, 50, 55, 60, 65, 80)]
    assert costs == sorted(costs) and costs[0] < costs[-1]


def test_what_cannot_be_reached_by_skipping_is_sampled_in_full():
    assert sample(lambda _: 1e-2, 60) == "F" * STEPS


def test_a_low_wish_stops_where_forecasts_would_disturb_each_other():
    assert cost(sample(lambda _: 6e-3, 5)) > 0.45  # gaps of 2, though the budget would allow more
    assert sample(lambda _: 0.2, 5) == "F" * STEPS


@pytest.mark.parametrize("closeness", [40, 45, 50, 55])
@pytest.mark.parametrize("rate", [1e-4, 1e-3, 3e-3])
def test_the_sum_of_effects_stays_near_the_budget(rate, closeness):
    done = sample(lambda _: rate, closeness)
    foreseen = 20.0 - 20 * math.log10(max(sum(rate * g * (g - 1) / 2 for g in gaps(done)), 1e-9))
    assert foreseen > closeness - 1.5


@pytest.mark.parametrize("rate", [3e-4, 1e-3, 2e-3])
def test_the_gap_changes_rarely_and_by_one_once_skipping_has_begun(rate):
    found = gaps(sample(lambda _: rate, 40, steps=50))
    begun = found[next(i for i, g in enumerate(found) if g > 1):-1]
    changes = [b - a for a, b in zip(begun, begun[1:]) if a != b]
    assert len(changes) <= 3 and set(changes) <= {1, -1}


def test_skipping_stops_when_forecasts_become_bad():
    done = sample(lambda ordinal: 1e-3 if ordinal < 15 else 0.1, 42)
    assert "-" in done[:15] and "-" not in done[20:]


def test_a_run_that_is_bad_for_long_is_left_alone():
    assert "-" not in sample(lambda ordinal: 0.1 if ordinal < 20 else 1e-4, 30)


def test_a_bad_beginning_is_waited_for():
    done = sample(lambda ordinal: 0.1 if ordinal < 12 else 1e-3, 42)
    assert "-" not in done[:12] and "-" in done[12:]


def test_uncorrected_errors_allow_less():
    assert cost(sample(lambda _: 1e-3, 42, corrected=False)) > cost(sample(lambda _: 1e-3, 42))


def test_outside_the_window_and_at_the_end_nothing_is_skipped():
    done = sample(lambda _: 1e-5, 35, window=Window(0.5, 0.8))
    assert "-" not in done[:15] + done[25:] and "-" in done[15:24]
    assert sample(lambda _: 1e-5, 35)[-1] == "F"


def test_rates_are_read_once_for_each_gap():
    reads = []

    def rates(ordinal):
        reads.append(ordinal)
        return 1e-5

    rhythm = Rhythm(AutoSettings(35), lambda percent: 1 - percent, True)
    clock = Clock([1 - i / STEPS for i in range(STEPS + 1)])
    for ordinal in range(STEPS):
        evaluation = clock.tick(1 - ordinal / STEPS)
        if ordinal < 4 or not rhythm.may_skip(evaluation, (rates(o) for o in [ordinal])):
            rhythm.computed(evaluation)
    assert 0 < len(reads) < 12


def euler(skip, steps, slope, wrong):
    """The latent at the end of an Euler run; slope(sigma) is misjudged by `wrong` at `skip`, then made good."""
    history, correction = History(FORECASTS["quadratic"]), Correction()
    clock, x = Clock([(1 - i / steps) ** 1.3 for i in range(steps + 1)]), torch.ones(1, 1, dtype=torch.float64)
    for sigma in clock.grid:
        evaluation = clock.tick(sigma)
        weight = torch.full((1, 1), -evaluation.step, dtype=torch.float64)
        value = torch.full((1, 1), slope(sigma), dtype=torch.float64)
        if evaluation.ordinal in skip:
            value = value + wrong
            correction.add(evaluation, value, weight)
        else:
            history.push(sigma, (value,))
            shift = correction.settle(evaluation, history, weight)
            value = value if shift is None else value + shift
        x = x + weight * value
    return x.item()


@pytest.mark.parametrize("skip", [range(5, 29, 2), [i for i in range(5, 29) if i % 3], [7, 8, 9, 12]])
def test_however_wrong_a_forecast_was_most_of_it_is_made_good(skip):
    slope = lambda sigma: 1 - 2 * sigma + 3 * sigma ** 2  # what interpolation knows exactly
    full = euler((), STEPS, slope, 0.0)
    left = euler(skip, STEPS, slope, 5.0) - full
    wrong = 5.0 * sum(((1 - i / STEPS) ** 1.3) - ((1 - (i + 1) / STEPS) ** 1.3) for i in skip)
    assert abs(left) < 0.25 * wrong


def test_of_an_error_half_shrinks_with_the_noise_level():
    history, correction, one = History(FORECASTS["linear"]), Correction(), torch.ones(1, 1)
    clock = Clock([0.9, 0.8, 0.7, 0.4, 0.0])
    first, skipped, computed, _ = (clock.tick(s) for s in (0.9, 0.8, 0.7, 0.4))
    history.push(first.sigma, (one,))
    correction.add(skipped, 3 * one, 0.1 * one)
    history.push(computed.sigma, (one,))
    shift = correction.settle(computed, history, 0.3 * one).item()
    assert shift == pytest.approx(-2 * 0.1 / 0.3 * (0.5 + 0.5 * 0.4 / 0.7), rel=1e-4)
    assert correction.settle(computed, history, one) is None  # once


def test_with_nothing_skipped_there_is_nothing_to_make_good():
    assert Correction().settle(None, None, None) is None
