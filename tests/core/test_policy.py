"""A policy knows its cost and its model, and can be moved to other steps."""

import pytest

from fastercache_core.actions import COMPUTE, Action, Step
from fastercache_core.calibration.policy import MAX_EVALUATIONS, Point, Policy, Setup
from fastercache_core.calibration.policy_file import dumps, loads

SETUP = Setup("SD3 9M a1b2", "euler", "simple", 30, 4.5, 3.0, "128x128")
PREDICT = Step(Action.PREDICT, 0.0, 1.0, (1.5, -0.5), (1.0, 0.0))


def sigmas(count, end=0.1):
    return tuple(end ** (i / max(count - 1, 1)) for i in range(count))


def point(keys, count=30, error=0.01, other=PREDICT):
    return Point(error, tuple(COMPUTE if i in keys else other for i in range(count)))


EVEN = point({0, 1, *range(2, 29, 2), 29})
SPARSE = point({0, 1, *range(3, 29, 3), 29}, error=0.05)
POLICY = Policy(SETUP, sigmas(30), (SPARSE, EVEN), 1)


def keys(policy):
    return [i for i, step in enumerate(policy.steps) if step.action is Action.COMPUTE]


def test_the_most_expensive_point_within_the_budget_is_chosen():
    assert POLICY.at(0.6).cost == pytest.approx(17 / 30) and POLICY.at(0.6).error == 0.01
    assert POLICY.at(0.5).cost == pytest.approx(12 / 30)
    assert POLICY.at(0.1).cost == pytest.approx(12 / 30), "below the curve: its cheapest point"


def test_it_knows_its_model():
    assert POLICY.matches("SD3 9M a1b2") and not POLICY.matches("SDXL")


def test_without_weights_the_actions_stay():
    plain = POLICY.without_weights()
    assert [p.actions() for p in plain.points] == [p.actions() for p in POLICY.points]
    assert not any(step.cond or step.difference for step in plain.steps) and plain.cost == POLICY.cost


def test_on_its_own_grid_nothing_changes():
    assert POLICY.for_sigmas(POLICY.sigmas) is POLICY
    assert POLICY.for_sigmas([s * 1.0001 for s in POLICY.sigmas]) is POLICY


@pytest.mark.parametrize("count", [12, 20, 29, 31, 50, 100])
def test_other_step_counts_cost_about_the_same_and_compute_both_ends(count):
    moved = POLICY.for_sigmas(sigmas(count))
    assert moved.cost == pytest.approx(POLICY.cost, abs=2.5 / count)
    assert {0, count - 1} <= set(keys(moved)) and len(moved.steps) == count
    assert moved.setup.steps == count and loads(dumps(moved)) == moved


def test_the_computed_evaluations_stay_where_they_were_in_log_sigma():
    dense_early = Policy(SETUP, sigmas(30), (point({*range(12), 17, 23, 29}),))
    moved = dense_early.for_sigmas(sigmas(60))
    early = [i for i in keys(moved) if moved.sigmas[i] > dense_early.sigmas[12]]
    assert len(early) >= 0.75 * len(keys(moved)), "12 of 15 lay there"


def test_other_actions_follow_the_nearest_evaluation_and_weights_are_dropped():
    early, late = Step(Action.PREDICT, 0.0, 1.0, (1.0,), (1.0,)), Step(Action.REUSE, 0.6)
    steps = tuple(COMPUTE if i % 3 == 0 or i == 29 else (early if i < 15 else late) for i in range(30))
    moved = Policy(SETUP, sigmas(30), (Point(0.1, steps),)).for_sigmas(sigmas(45))
    letters = moved.points[0].actions()
    assert letters.rindex("P") < letters.index("R")
    assert not any(step.cond or step.difference for step in moved.steps)


@pytest.mark.parametrize("other, computed", [(Step(Action.PREDICT), {0, 1, 2}), (Step(Action.REUSE, 0.5), {0})])
def test_a_run_begins_with_the_values_that_its_forecasts_are_made_from(other, computed):
    sparse = Policy(SETUP, sigmas(30), (point({0, 10, 20, 29}, other=other),))
    assert {k for k in keys(sparse.for_sigmas(sigmas(40))) if k < 5} == computed


def test_a_single_evaluation_is_computed():
    assert POLICY.for_sigmas([0.5]).points[0].actions() == "C"


@pytest.mark.parametrize("other", [[], sigmas(MAX_EVALUATIONS + 1), [1.0, 0.5, 0.0], [1.0, -0.5]])
def test_a_run_that_no_policy_fits_is_told_and_does_not_fail(other):
    assert POLICY.for_sigmas(other) is None
    assert POLICY.for_sigmas(sigmas(MAX_EVALUATIONS)) is not None


class Counted(float):
    """A sigma that counts how often it is compared with another one."""

    compared = 0

    def __truediv__(self, other):
        Counted.compared += 1
        return float(self) / other


def test_sigmas_are_compared_once_however_many_points_there_are():
    """Else a policy of 300 points and 1000 steps takes half a minute to move."""
    large = Policy(SETUP, tuple(Counted(s) for s in sigmas(100)), (point({*range(0, 100, 2), 99}, 100),) * 50)
    moved = large.for_sigmas(sigmas(99))
    assert len(moved.points) == 50 and moved.cost == pytest.approx(large.cost, abs=0.02)
    assert Counted.compared <= 100 * 99
