"""Fixed intervals: one evaluation in so many is computed, once forecasts are good enough."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from fastercache_core.actions import Action
from fastercache_core.clock import Clock, Evaluation, Interval, Window
from fastercache_core.controllers.interval import IntervalSettings, Tolerance, local_errors
from fastercache_core.protocols import Controller, RunContext, Signals
from fastercache_core.signal import OutputSettings, Signal
from fastercache_core.solvers import Solver
from support import grids

GRID = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
HEUN = [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]
FIELD = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def controller(settings: IntervalSettings, estimates: bool = False, reuses: bool = False) -> Controller:
    context = RunContext(lambda percent: 1.0 - percent, Solver(), ())
    context = RunContext(**{**vars(context), "estimates": estimates, "reuses": reuses})
    return settings.controller(context)


def sample(
    settings: IntervalSettings,
    sigmas: Sequence[float] = GRID[:-1],
    forecast: str = "hold",
    value: Callable[[float], float] = lambda sigma: 1.0,
    differences: int = 0,
) -> str:
    """One letter an evaluation at `sigmas`; value(sigma): of the output and all differences."""
    grid = [*dict.fromkeys(sigmas), 0.0]
    chooses, clock, done = controller(settings, differences > 0), Clock(grid), ""
    output, *others = (OutputSettings(forecast).signal() for _ in range(1 + differences))
    for sigma in sigmas:
        evaluation = clock.tick(sigma)
        action = chooses.choose(evaluation, Signals(output, others)).action
        chooses.took(evaluation, action)
        for signal in (output, *others) if action is Action.COMPUTE else ():
            signal.observe(sigma, value(sigma) * FIELD, None if settings.tolerance is None else torch.ones(1))
        done += action.letter
    return done


# The interval


def test_one_in_two_is_computed_and_the_last_always() -> None:
    assert sample(IntervalSettings(Interval(2))) == "CPCPC"
    assert sample(IntervalSettings(Interval(5))) == "CPPPC"


def test_a_step_that_takes_nearly_all_noise_away_is_computed_whatever_comes_after_it() -> None:
    """The scheduler `normal` of a flow model ends so."""
    assert sample(IntervalSettings(Interval(2)), [1.0, 0.8, 0.6, 0.4, 0.15, 0.009]) == "CPCPCC"
    assert sample(IntervalSettings(Interval(2)), [1.0, 0.8, 0.6, 0.15, 0.009]) == "CPCCC"
    assert sample(IntervalSettings(Interval(2)), [1.0, 0.8, 0.6, 0.3, 0.15]) == "CPCPC"


def test_interval_one_computes_everything() -> None:
    assert sample(IntervalSettings(Interval(1), Interval(1)), differences=1) == "CCCCC"


def test_outside_the_window_everything_is_computed() -> None:
    assert sample(IntervalSettings(Interval(3, Window(0.4, 0.6)))) == "CCPPC"
    assert sample(IntervalSettings(estimate=Interval(3, Window(0.4, 0.6))), differences=1) == "CCEEC"


def test_two_calls_a_step_count_as_two_evaluations_and_both_last_ones_are_computed() -> None:
    letters = sample(IntervalSettings(Interval(2)), HEUN)
    assert len(letters) == 9 and letters[-2:] == "CC" and letters.count("P") == 3


@pytest.mark.parametrize("forecast, depth", [("hold", 1), ("linear", 2), ("blend", 3), ("fitted", 3), ("hedged", 3)])
def test_nothing_is_skipped_before_the_forecast_has_its_values(forecast: str, depth: int) -> None:
    for settings, differences in ((IntervalSettings(Interval(5)), 0), (IntervalSettings(estimate=Interval(5)), 1)):
        letters = sample(settings, forecast=forecast, differences=differences)
        assert letters[:depth] == "C" * depth and letters[depth] in "PE" and letters[-1] == "C"


def test_estimating_needs_a_difference_and_every_one_of_them() -> None:
    settings = IntervalSettings(estimate=Interval(2))
    assert sample(settings, differences=0) == "CCCCC" and sample(settings, differences=2) == "CECEC"
    chooses, clock = controller(settings, estimates=True), Clock(GRID)
    known, first = OutputSettings("hold").signal(), clock.tick(1.0)
    known.observe(1.0, FIELD)
    chooses.took(first, Action.COMPUTE)
    second = clock.tick(0.8)
    assert chooses.choose(second, Signals(known, [known, None])).action is Action.COMPUTE
    assert chooses.choose(second, Signals(known, [known, known])).action is Action.ESTIMATE


def test_what_is_predicted_needs_the_differences_too() -> None:
    chooses, clock, known = (
        controller(IntervalSettings(Interval(2)), True),
        Clock(GRID),
        OutputSettings("hold").signal(),
    )
    known.observe(1.0, FIELD)
    chooses.took(clock.tick(1.0), Action.COMPUTE)
    second = clock.tick(0.8)
    assert chooses.choose(second, Signals(known, [None])).action is Action.COMPUTE
    assert chooses.choose(second, Signals(known, [known])).action is Action.PREDICT


def test_after_a_reset_the_next_evaluation_is_computed() -> None:
    chooses, clock, known = controller(IntervalSettings(Interval(3))), Clock(GRID), OutputSettings("hold").signal()
    known.observe(1.0, FIELD)
    chooses.took(clock.tick(1.0), Action.COMPUTE)
    second = clock.tick(0.8)
    assert chooses.choose(second, Signals(known, [])).action is Action.PREDICT
    chooses.reset()
    assert chooses.choose(second, Signals(known, [])).action is Action.COMPUTE


def test_features_are_asked_for_unless_differences_must_be_comparable() -> None:
    first = Clock(GRID).tick(1.0)
    choose = lambda estimates, others: (
        controller(IntervalSettings(), estimates, reuses=True).choose(first, Signals(None, others)).action
    )
    assert choose(False, []) is choose(False, [None]) is choose(True, []) is Action.REUSE
    assert choose(True, [None]) is Action.COMPUTE
    assert controller(IntervalSettings()).choose(first, Signals(None, [])).action is Action.COMPUTE


# The tolerance


def test_without_a_tolerance_errors_do_not_matter() -> None:
    assert sample(IntervalSettings(Interval(2)), value=lambda sigma: 1e6 * math.sin(50 * sigma)) == "CPCPC"

    def fails() -> Sequence[float]:
        raise AssertionError("errors were looked at")
        yield 0.0

    assert Tolerance(None, 8.0).allows(fails())


def test_without_a_tolerance_no_errors_are_measured() -> None:
    class Pass:
        space = None

    assert controller(IntervalSettings(Interval(2))).unit(Pass(), FIELD) is None


def test_nothing_is_skipped_before_a_forecast_from_all_its_values_was_compared() -> None:
    letters = [
        sample(IntervalSettings(Interval(2), tolerance=1e9), grids.even(12)[:-1], forecast)
        for forecast in ("hold", "linear", "fitted")
    ]
    assert [line.index("P") for line in letters] == [2, 3, 4]


def test_it_begins_at_the_tolerance_goes_on_beyond_and_stops_when_patience_ends() -> None:
    tolerance = Tolerance(0.01, patience=4.0)
    assert [tolerance.allows([e]) for e in (0.02, 0.009, 0.03, 0.05, 0.03)] == [False, True, True, False, False]


def test_errors_of_all_signals_add_up() -> None:
    tolerance = Tolerance(0.01, patience=1.0)
    assert tolerance.allows([0.004, 0.005]) and not tolerance.allows([0.006, 0.006])


def test_skipping_begins_where_forecasts_become_good() -> None:
    def rough_then_smooth(sigma: float) -> float:
        return math.sin(400 * sigma) if sigma > 0.5 else sigma

    sigmas = grids.even(40)[:-1]
    letters = sample(IntervalSettings(Interval(2), tolerance=1e-3), sigmas, "linear", rough_then_smooth)
    assert "P" not in letters[:20] and letters[23:].count("P") > 5


def test_an_estimate_may_be_as_wrong_as_the_share_of_work_that_it_saves() -> None:
    """Of three branches two are saved, of two one: 2/3 and 1/2 of the tolerance, for two errors and for one."""
    sigmas = grids.even(12)[:-1]

    def limit(differences: int) -> float:
        low, high = -6.0, 0.0
        for _ in range(12):
            middle = (low + high) / 2
            settings = IntervalSettings(estimate=Interval(2), tolerance=10**middle)
            skips = "E" in sample(settings, sigmas, "linear", lambda sigma: sigma**2, differences)
            low, high = (low, middle) if skips else (middle, high)
        return 10**high

    limits = [limit(differences) for differences in (1, 2)]
    assert limits[1] / limits[0] == pytest.approx(2 / (2 / 3) / (1 / (1 / 2)), rel=0.05)


def observed(error: float = 1.0) -> Signal:
    """A line through 1.0 and 0.9 whose forecast at 0.8 was wrong by `error` for one of two pictures."""
    signal = OutputSettings("linear").signal()
    right, wrong = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), error)
    for sigma in (1.0, 0.9):
        signal.observe(sigma, torch.cat([wrong, right]), torch.ones(2))
    signal.observe(0.8, torch.zeros(2, 1, 4, 4), torch.ones(2))
    return signal


def local_error(sigma: float, step: float, error: float = 1.0) -> float:
    return next(iter(local_errors(Signals(observed(error), []), Evaluation(3, sigma, 0.0, False, step))))


def test_the_worst_picture_of_a_batch_counts() -> None:
    assert local_error(0.7, 0.1) == pytest.approx(0.1)


def test_an_error_grows_with_the_distance_from_what_is_known_and_with_the_step() -> None:
    assert local_error(0.6, 0.1) == pytest.approx(3 * local_error(0.7, 0.1)), "(0.2 * 0.3) / (0.1 * 0.2)"
    assert local_error(0.7, 0.2) == pytest.approx(2 * local_error(0.7, 0.1))
    assert local_error(0.7, 0.1, 5.0) == pytest.approx(5 * local_error(0.7, 0.1))


def test_before_anything_was_compared_the_error_is_infinite() -> None:
    signal = OutputSettings("linear").signal()
    assert [*local_errors(Signals(signal, []), Evaluation(0, 0.8, 0.0, False, 0.1))] == [math.inf]
    signal.observe(1.0, FIELD, torch.ones(1))
    signal.observe(0.9, FIELD, torch.ones(1))
    assert [*local_errors(Signals(signal, []), Evaluation(2, 0.8, 0.0, False, 0.1))] == [math.inf]
