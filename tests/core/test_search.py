"""The search finds what trying everything finds, for every budget, and finds it fast."""
import itertools
import random
import time

import pytest

from fastercache_core.search import Choice, Worst, falling, search

GAP = 4


def random_choices(seed, actions):
    """Random losses that depend on every key they are told of. actions: {name: units}."""
    known = {}

    def choices(keys, following):
        chance = random.Random(f"{seed} {keys} {following}")
        between = range(keys[0] + 1, following)
        drawn = [Choice(chance.random(), sum(actions[name] for name in names), names)
                 for names in itertools.product(actions, repeat=len(between))]
        return known.setdefault((keys, following), drawn)

    return choices


def every_way(count, choices, full_units, depth):
    """(units, list of losses, actions) of every way there is."""
    inner = range(1, count - 1)
    for size in range(count - 1):
        for some in itertools.combinations(inner, size):
            keys = [0, *some, count - 1]
            if max(b - a for a, b in zip(keys, keys[1:])) > GAP:
                continue
            segments = [choices(tuple(reversed(keys[:i + 1]))[:depth], keys[i + 1]) if keys[i + 1] > keys[i] + 1
                        else [Choice(0.0, 0, ())] for i in range(len(keys) - 1)]
            for picked in itertools.product(*segments):
                actions = ["FULL"]
                for choice in picked:
                    actions += [*choice.actions, "FULL"]
                units = len(keys) * full_units + sum(choice.units for choice in picked)
                yield units, [choice.loss for choice in picked], tuple(actions)


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
    choices = random_choices(seed, {"JUMP": 0, "ESTIMATE": 1, "REUSE": 2} if seed % 2 else {"JUMP": 0})
    found = search(7, choices, 3, GAP, depth)
    expected = brute_force(every_way(7, choices, 3, depth), sum)
    assert {c.units: c.loss for c in found} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("depth", [1, 2])
def test_minimax_is_settled_down_to_the_smallest_loss(seed, depth):
    choices = random_choices(seed, {"JUMP": 0, "ESTIMATE": 1})
    found = search(7, choices, 2, GAP, depth, "minimax")
    ways = list(every_way(7, choices, 2, depth))
    expected = brute_force(ways, lambda losses: Worst(*losses))
    assert {c.units: c.loss for c in found} == {units: float(value) for units, value in expected.items()}
    losses_of = {actions: Worst(*losses) for _, losses, actions in ways}
    assert all(losses_of[c.actions] == expected[c.units] for c in found)
    sums = {actions: sum(losses) for _, losses, actions in ways}
    assert [c.loss for c in found] == pytest.approx([sums[c.actions] for c in found]), "told as a sum"


def test_the_actions_found_have_the_cost_and_loss_that_is_claimed():
    choices = random_choices(1, {"JUMP": 0, "ESTIMATE": 1})
    for found in search(9, choices, 2, GAP, 2):
        price = {"FULL": 2, "JUMP": 0, "ESTIMATE": 1}
        assert sum(price[action] for action in found.actions) == found.units
        keys = [i for i, action in enumerate(found.actions) if action == "FULL"]
        assert keys[0] == 0 and keys[-1] == 8
        loss = 0.0
        for i, (a, b) in enumerate(zip(keys, keys[1:])):
            if b > a + 1:
                options = choices(tuple(reversed(keys[:i + 1]))[:2], b)
                loss += next(c.loss for c in options if c.actions == found.actions[a + 1:b])
        assert loss == pytest.approx(found.loss)


def test_the_curve_ends_where_everything_is_computed_without_loss():
    *_, last = search(8, random_choices(3, {"JUMP": 0}), 1, GAP, 2)
    assert last.loss == 0.0 and last.actions == ("FULL",) * 8


def test_where_only_the_end_matters_the_end_is_computed():
    def late(keys, following):
        between = range(keys[0] + 1, following)
        return [Choice(sum(between) ** 3, 0, ("JUMP",) * len(between))]

    half = next(c for c in search(20, late, 1, 6, 1) if c.units == 10)
    keys = [i for i, action in enumerate(half.actions) if action == "FULL"]
    assert sum(key >= 10 for key in keys) >= 7


def test_only_what_is_better_than_everything_cheaper_stays():
    cheap, good, poor = Choice(1.0, 0, ("JUMP",)), Choice(0.1, 1, ("ESTIMATE",)), Choice(0.5, 2, ("REUSE",))
    assert falling([cheap, good, poor]) == [cheap, good]


@pytest.mark.parametrize("objective", ["sum", "minimax"])
def test_fifty_evaluations_with_gaps_of_six_take_less_than_two_seconds(objective):
    choices = lambda keys, following: [Choice(float(following - keys[0]), 0, ("JUMP",) * (following - keys[0] - 1))]
    begun = time.process_time()
    found = search(50, choices, 1, 6, 2 if objective == "minimax" else 3, objective)
    assert time.process_time() - begun < 2.0 and len(found) > 30
