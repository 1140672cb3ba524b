"""The search finds what trying everything finds, for every budget, and looks at no more than it must."""

import itertools
import random

import pytest

from fastercache_core.actions import Action
from fastercache_core.calibration.losses import Choice, Losses
from fastercache_core.calibration.policy import MAX_POINTS, MAX_STEPS, Point, thinned
from fastercache_core.calibration.search import Worst, find_points, search
from support.recorded import smooth_then_rough

GAP = 4
PREDICT, ESTIMATE, REUSE, COMPUTE = Action.PREDICT, Action.ESTIMATE, Action.REUSE, Action.COMPUTE


def random_choices(seed, actions):
    """Random losses that depend on every key they are told of. actions: {action: units}."""
    drawn = {}

    def choices(keys, following):
        chance = random.Random(f"{seed} {keys} {following}")
        between = range(keys[0] + 1, following)
        ways = [
            Choice(chance.random(), sum(actions[action] for action in way), way)
            for way in itertools.product(actions, repeat=len(between))
        ]
        return drawn.setdefault((keys, following), ways)

    return choices


def every_way(count, choices, full_units, depth):
    """(units, list of losses, actions) of every way there is."""
    for size in range(count):
        for some in itertools.combinations(range(1, count), size):
            keys = [0, *some, count]  # the end of the run is no evaluation
            if max(b - a for a, b in itertools.pairwise(keys)) > GAP:
                continue
            segments = [
                choices(tuple(reversed(keys[: i + 1]))[:depth], keys[i + 1])
                if keys[i + 1] > keys[i] + 1
                else [Choice(0.0, 0, ())]
                for i in range(len(keys) - 1)
            ]
            for picked in itertools.product(*segments):
                actions = [COMPUTE]
                for choice in picked:
                    actions += [*choice.actions, COMPUTE]
                units = (len(keys) - 1) * full_units + sum(choice.units for choice in picked)
                yield units, [choice.loss for choice in picked], tuple(actions[:-1])


def brute_force(ways, value):
    """{units: least value} where it is below that of every cheaper one."""
    table = {}
    for units, losses, _ in ways:
        table[units] = min(table.get(units, value([float("inf")])), value(losses))
    curve, best = {}, value([float("inf")])
    for units in sorted(table):
        if table[units] < best:
            curve[units] = best = table[units]
    return curve


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_sum_is_the_least_there_is_for_every_budget(seed, depth):
    choices = random_choices(seed, {PREDICT: 0, ESTIMATE: 1, REUSE: 2} if seed % 2 else {PREDICT: 0})
    curve = search(7, choices, 3, GAP, depth)
    expected = brute_force(every_way(7, choices, 3, depth), sum)
    assert {c.units: c.loss for c in curve} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("depth", [1, 2])
def test_minimax_is_settled_down_to_the_smallest_loss(seed, depth):
    choices = random_choices(seed, {PREDICT: 0, ESTIMATE: 1})
    curve = search(7, choices, 2, GAP, depth, "minimax")
    ways = list(every_way(7, choices, 2, depth))
    expected = brute_force(ways, lambda losses: Worst(*losses))
    assert {c.units: c.loss for c in curve} == {units: float(value) for units, value in expected.items()}
    losses_of = {actions: Worst(*losses) for _, losses, actions in ways}
    assert all(losses_of[c.actions] == expected[c.units] for c in curve)
    sums = {actions: sum(losses) for _, losses, actions in ways}
    assert [c.loss for c in curve] == pytest.approx([sums[c.actions] for c in curve]), "told as a sum"


def test_the_actions_of_the_curve_have_its_cost_and_loss():
    choices = random_choices(1, {PREDICT: 0, ESTIMATE: 1})
    curve = search(9, choices, 2, GAP, 2)
    assert len(curve) > 5
    for entry in curve:
        price = {COMPUTE: 2, PREDICT: 0, ESTIMATE: 1}
        assert sum(price[action] for action in entry.actions) == entry.units
        keys = [i for i, action in enumerate(entry.actions) if action is COMPUTE]
        assert keys[0] == 0
        loss = 0.0
        for i, (a, b) in enumerate(itertools.pairwise([*keys, 9])):
            if b > a + 1:
                options = choices(tuple(reversed(keys[: i + 1]))[:2], b)
                loss += next(c.loss for c in options if c.actions == entry.actions[a + 1 : b])
        assert loss == pytest.approx(entry.loss)


def test_the_curve_ends_where_everything_is_computed_without_loss():
    *_, last = search(8, random_choices(3, {PREDICT: 0}), 1, GAP, 2)
    assert last.loss == 0.0 and last.actions == (COMPUTE,) * 8


def test_where_only_the_end_matters_the_end_is_computed():
    def late(keys, following):
        between = range(keys[0] + 1, following)
        return [Choice(sum(between) ** 3, 0, (PREDICT,) * len(between))]

    half = next(c for c in search(20, late, 1, 6, 1) if c.units == 10)
    keys = [i for i, action in enumerate(half.actions) if action is COMPUTE]
    assert sum(key >= 10 for key in keys) >= 7


@pytest.mark.parametrize("objective, depth", [("sum", 3), ("minimax", 2)])
def test_the_work_grows_with_the_gaps_and_not_with_the_number_of_ways(objective, depth):
    asked = []

    def choices(keys, following):
        asked.append((keys, following))
        return [Choice(float(following - keys[0]), 0, (PREDICT,) * (following - keys[0] - 1))]

    curve = search(50, choices, 1, 6, depth, objective)
    assert len(curve) > 30 and len(asked) == len(set(asked)) <= 50 * 6**depth
    assert max(len(keys) for keys, _ in asked) == depth


def test_a_prediction_looks_back_at_most_three_values():
    depths = set()

    class Spy(Losses):
        def choices(self, keys, following):
            depths.add(len(keys))
            return super().choices(keys, following)

    reference = smooth_then_rough()
    find_points(reference, Spy(reference))
    assert depths == {1, 2, 3}


def test_a_curve_is_thinned_to_what_a_policy_holds():
    long, many = MAX_STEPS // 100, MAX_POINTS + 500
    for count, evaluations, most in ((many, 2, MAX_POINTS), (300, long, 100), (90, long, 90)):
        curve = [Point(1.0 - i / count, (None,) * evaluations) for i in range(count)]
        few = thinned(curve)
        assert len(few) == most and few[0] is curve[0] and few[-1] is curve[-1]
        errors = [point.error for point in few]
        steps = [a - b for a, b in itertools.pairwise(errors)]
        assert min(steps) > 0 and max(steps) <= 2 * min(steps) + 1e-9
