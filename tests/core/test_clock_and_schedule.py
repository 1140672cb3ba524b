"""Evaluations are told by ordinal and sigma, windows by sigma, and the last one is never skipped."""
import pytest

from fastercache_core.clock import Clock, Window
from fastercache_core.schedule import Interval, IntervalSchedule

GRID = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
PERCENT_TO_SIGMA = lambda percent: 1.0 - percent


def run(schedule, sigmas):
    """Which evaluations of a run are computed, as a list of booleans."""
    clock, computed = Clock(GRID), []
    for sigma in sigmas:
        evaluation = clock.tick(sigma)
        computed.append(not schedule.may_skip(evaluation))
        if computed[-1]:
            schedule.computed(evaluation)
    return computed


def test_one_in_two_is_computed_and_the_last_always():
    schedule = IntervalSchedule(Interval(2), PERCENT_TO_SIGMA)
    assert run(schedule, GRID[:-1]) == [True, False, True, False, True]
    assert run(IntervalSchedule(Interval(5), PERCENT_TO_SIGMA), GRID[:-1]) == [True, False, False, False, True]


def test_interval_one_computes_everything():
    assert all(run(IntervalSchedule(Interval(1), PERCENT_TO_SIGMA), GRID[:-1]))


def test_outside_the_window_everything_is_computed():
    schedule = IntervalSchedule(Interval(3, Window(0.4, 0.6)), PERCENT_TO_SIGMA)
    assert run(schedule, GRID[:-1]) == [True, True, False, False, True]


def test_two_calls_a_step_count_as_two_evaluations_and_both_last_ones_are_computed():
    heun = [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]
    computed = run(IntervalSchedule(Interval(2), PERCENT_TO_SIGMA), heun)
    assert len(computed) == 9 and computed[-2:] == [True, True] and computed.count(False) == 3


def test_progress_counts_steps_not_calls_and_tolerates_a_shifted_first_sigma():
    clock = Clock(GRID)
    progress = [clock.tick(s).progress for s in (0.9999, 0.9, 0.8, 0.7, 0.2)]
    assert progress == pytest.approx([0.0, 0.0, 0.25, 0.25, 1.0])


def test_a_run_that_does_not_end_at_zero_still_knows_its_last_step():
    clock = Clock([1.0, 0.9, 0.75])
    assert [clock.tick(s).is_last for s in (1.0, 0.9)] == [False, True]
