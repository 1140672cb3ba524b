"""A policy survives its file, refuses damaged and hostile ones, and can be moved to other steps."""
import json
import math
import random

import pytest

from fastercache_core.policy import FULL, MAX_BYTES, Point, Policy, PolicyError, Setup, Step, dumps, loads

SETUP = Setup("SD3 9M a1b2", "euler", "simple", 30, 4.5, 3.0, "128x128")
JUMP = Step("JUMP", 0.0, 1.0, (1.5, -0.5), (1.0, 0.0))


def sigmas(count, end=0.1):
    return tuple(end ** (i / (count - 1)) for i in range(count))


def point(keys, count=30, error=0.01, other=JUMP):
    return Point(error, tuple(FULL if i in keys else other for i in range(count)))


EVEN = point({0, 1, *range(2, 29, 2), 29})
SPARSE = point({0, 1, *range(3, 29, 3), 29}, error=0.05)
POLICY = Policy(SETUP, sigmas(30), (SPARSE, EVEN), 1)


def keys(policy):
    return [i for i, step in enumerate(policy.steps) if step.action == "FULL"]


def broken(**changes):
    return json.dumps({**json.loads(dumps(POLICY)), **changes})


def with_step(index, **changes):
    data = json.loads(dumps(POLICY))
    data["points"][0]["steps"][index].update(changes)
    return json.dumps(data)


def test_what_is_written_is_read():
    mixed = Policy(SETUP, sigmas(30), (point({0, 29}, other=Step("MIX", 0.7, 0.25)), EVEN))
    assert loads(dumps(POLICY)) == POLICY
    assert loads(dumps(mixed).encode()) == mixed


def test_the_dearest_point_within_the_budget_is_chosen():
    assert POLICY.at(0.6).cost == pytest.approx(17 / 30) and POLICY.at(0.6).error == 0.01
    assert POLICY.at(0.5).cost == pytest.approx(12 / 30)
    assert POLICY.at(0.1).cost == pytest.approx(12 / 30), "below the curve: its cheapest point"


def test_it_knows_its_model_and_what_else_differs():
    assert POLICY.matches("SD3 9M a1b2") and not POLICY.matches("SDXL")
    assert SETUP.differs(Setup("SD3 9M a1b2", "euler", "karras", 20, 7.0, 3.0, "128x128")) == ["scheduler", "cfg"]


@pytest.mark.parametrize("text, says", [
    ("", "JSON"), ("{", "JSON"), ("[" * 100000, "JSON"), ("null", "not a policy"), ("[]", "not a policy"),
    (broken(format="something"), "not a policy"), (broken(version=2), "update the pack"),
    (broken(version="1"), "`version`"), (broken(chosen=2), "`chosen`"), (broken(chosen=True), "`chosen`"),
    (broken(sigmas=[]), "`sigmas`"), (broken(sigmas=[1.0] * 2000), "`sigmas`"),
    (broken(sigmas=["1"] * 30), "`sigmas`"), (broken(sigmas=[0.0] * 30), "`sigmas`"),
    (broken(sigmas=[math.nan] * 30), "NaN"), (broken(sigmas=[math.inf] * 30), "Infinity"),
    (broken(points=[]), "`points`"), (broken(points={}), "`points`"), (broken(points=[1]), "object"),
    (broken(setup=None), "`setup`"), (broken(setup={"model": 1}), "`model`"), (broken(extra=1), "extra"),
    (dumps(POLICY).replace("0.05", "1e999"), "`error`"), (dumps(POLICY).replace("0.05", "9" * 5000), "JSON"),
    (with_step(5, action="EXEC"), "action"), (with_step(5, action=["JUMP"]), "`action`"),
    (with_step(0, action="JUMP"), "first evaluation"), (with_step(2, cond=[1.0] * 4), "weighs more values"),
    (with_step(5, cond=[1e9, 0.0]), "`cond`"), (with_step(5, cond=[None]), "`cond`"),
    (with_step(5, mix=1.5), "`mix`"), (with_step(5, cost=-1), "`cost`"), (with_step(5, __class__="x"), "__class__"),
    (" " * (MAX_BYTES + 1), "bytes"),
])
def test_a_damaged_or_hostile_file_is_refused_with_one_sentence(text, says):
    with pytest.raises(PolicyError, match=says) as error:
        loads(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_a_file_with_random_damage_never_does_anything_but_load_or_be_refused():
    text, chance = dumps(POLICY), random.Random(0)
    for _ in range(500):
        cut, length = chance.randrange(len(text)), chance.randrange(1, 9)
        damaged = text[:cut] + "".join(chance.choices('{}[]",:-e0919NaJ', k=length)) + text[cut + length:]
        try:
            loads(damaged)
        except PolicyError:
            pass


def test_on_its_own_grid_nothing_changes():
    assert POLICY.for_sigmas(POLICY.sigmas) is POLICY
    assert POLICY.for_sigmas([s * 1.0001 for s in POLICY.sigmas]) is POLICY


@pytest.mark.parametrize("count", [12, 20, 29, 31, 50, 100])
def test_other_step_counts_cost_about_the_same_and_compute_both_ends(count):
    moved = POLICY.for_sigmas(sigmas(count))
    assert moved.cost == pytest.approx(POLICY.cost, abs=2.5 / count)
    assert {0, count - 1} <= set(keys(moved)) and len(moved.steps) == count
    assert loads(dumps(moved)) == moved


def test_the_computed_evaluations_stay_where_they_were_in_log_sigma():
    dense_early = Policy(SETUP, sigmas(30), (point({*range(12), 17, 23, 29}),))
    moved = dense_early.for_sigmas(sigmas(60))
    early = [i for i in keys(moved) if moved.sigmas[i] > dense_early.sigmas[12]]
    assert len(early) >= 0.75 * len(keys(moved)), "12 of 15 lay there"


def test_other_actions_follow_the_nearest_evaluation_and_weights_stay_behind():
    early, late = Step("JUMP", 0.0, 1.0, (1.0,), (1.0,)), Step("REUSE", 0.6)
    steps = tuple(FULL if i % 3 == 0 or i == 29 else (early if i < 15 else late) for i in range(30))
    moved = Policy(SETUP, sigmas(30), (Point(0.1, steps),)).for_sigmas(sigmas(45))
    letters = moved.points[0].actions()
    assert letters.rindex("J") < letters.index("R")
    assert not any(step.cond or step.difference for step in moved.steps)


def test_a_single_evaluation_is_computed():
    assert POLICY.for_sigmas([0.5]).points[0].actions() == "F"
    with pytest.raises(PolicyError):
        POLICY.for_sigmas([])
