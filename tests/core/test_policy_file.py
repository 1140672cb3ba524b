"""A policy survives its file, and damaged and hostile files are refused."""

import json
import math
import random
from dataclasses import replace

import pytest

from fastercache_core.actions import COMPUTE, Action, Step
from fastercache_core.calibration.policy import MAX_STEPS, Point, Policy, PolicyError, Setup
from fastercache_core.calibration.policy_file import MAX_BYTES, dumps, loads

PREDICT = Step(Action.PREDICT, 0.0, 1.0, (1.5, -0.5, 1.0, 0.5), (1.0, 0.0, 0.0, 0.0))
SIGMAS = tuple(0.1 ** (i / 29) for i in range(30))


def point(keys, error=0.01, other=PREDICT):
    return Point(error, tuple(COMPUTE if i in keys else other for i in range(30)))


EVEN, SPARSE = point({0, 1, *range(2, 29, 2), 29}), point({0, 1, *range(3, 29, 3), 29}, error=0.05)
SETUP = Setup("SD3 9M a1b2", "euler", "simple", 30, 4.5, 3.0, "128x128")
POLICY = Policy(SETUP, SIGMAS, (SPARSE, EVEN), 1)


def broken(**changes):
    return json.dumps({**json.loads(dumps(POLICY)), **changes})


EVEN_JSON = json.loads(dumps(POLICY))["points"][1]


def with_step(index, **changes):
    data = json.loads(dumps(POLICY))
    data["points"][0]["steps"][index].update(changes)
    return json.dumps(data)


def test_what_is_written_is_read():
    others = [
        Step(Action.MIX, 0.7, 0.25),
        Step(Action.REUSE, 0.6),
        Step(Action.ESTIMATE, 0.5, difference=(1.0, 0.5, 0.2, 0.1)),
    ]
    mixed = Policy(replace(SETUP, shift=None), SIGMAS, tuple(point({0, 29}, other=step) for step in others), 2)
    assert loads(dumps(POLICY)) == POLICY
    assert loads(dumps(mixed).encode()) == mixed


def test_actions_are_written_as_the_words_that_a_user_reads():
    steps = json.loads(dumps(POLICY))["points"][0]["steps"]
    assert steps[0] == {"action": "computed", "cost": 1.0}
    assert steps[2] == {"action": "predicted", "cond": [1.5, -0.5, 1.0, 0.5], "difference": [1.0, 0.0, 0.0, 0.0]}


# fmt: off
REFUSED = [
    ("", "JSON"), ("{", "JSON"), ("[" * 100000, "JSON"), ("null", "not a policy"), ("[]", "not a policy"),
    (broken(format="something"), "not a policy"), (broken(version=4), "update the pack"),
    (broken(version=2), "find it again"), (broken(version="1"), "`version`"), (broken(chosen=2), "`chosen`"),
    (broken(chosen=True), "`chosen`"), (broken(sigmas=[]), "`sigmas`"), (broken(sigmas=[1.0] * 2000), "`sigmas`"),
    (broken(sigmas=["1"] * 30), "`sigmas`"), (broken(sigmas=[0.0] * 30), "`sigmas`"),
    (broken(sigmas=[math.nan] * 30), "NaN"), (broken(sigmas=[math.inf] * 30), "Infinity"),
    (broken(points=[]), "`points`"), (broken(points={}), "`points`"),
    (broken(points=[EVEN_JSON, 1]), "point 1: it must be an object"),
    (broken(points=[{"error": 0.1, "steps": [{"action": "computed"}] * 29}], chosen=0), "`steps` must be a list of 30"),
    (broken(setup=None), "`setup`"), (broken(setup={"model": 1}), "`model`"), (broken(extra=1), "extra"),
    (broken(setup={**json.loads(dumps(POLICY))["setup"], "model": "x" * 501}), "at most 500"),
    (dumps(POLICY).replace("0.05", "1e999"), "`error`"), (dumps(POLICY).replace("0.05", "9" * 5000), "JSON"),
    (with_step(5, action="EXEC"), "point 0: evaluation 5: `action` must be one of computed, "),
    (with_step(5, action=["predicted"]), "`action`"), (with_step(0, action="predicted"), "first evaluation"),
    (with_step(2, cond=[1.0] * 12), "evaluation 2 weighs more values"),
    (with_step(4, cond=[1.0] * 16), "evaluation 4 weighs more values"), (with_step(5, cond=[1e9, 0.0]), "`cond`"),
    (with_step(5, cond=[1.0] * 3), "does not weigh 4 bands"),
    (with_step(5, cond=[None]), "`cond`"), (with_step(5, cond=[1.0] * 33), "`cond`"), (with_step(5, mix=1.5), "`mix`"),
    (with_step(5, cost=-1), "`cost`"), (with_step(5, cost=True), "`cost`"), (with_step(5, __class__="x"), "__class__"),
    (" " * (MAX_BYTES + 1), "bytes"),
]
# fmt: on


@pytest.mark.parametrize("text, says", REFUSED)
def test_a_damaged_or_hostile_file_is_refused_with_one_sentence(text, says):
    with pytest.raises(PolicyError, match=says) as error:
        loads(text)
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 250 and sentence.endswith(".") and ".." not in sentence


def test_a_file_with_random_damage_never_does_anything_but_load_or_be_refused():
    text, chance, outcomes = dumps(POLICY), random.Random(0), []
    for _ in range(500):
        cut, length = chance.randrange(len(text)), chance.randrange(1, 9)
        damaged = text[:cut] + "".join(chance.choices('{}[]",:-e0919NaJ', k=length)) + text[cut + length :]
        try:
            outcomes.append(loads(damaged))
        except PolicyError as error:
            outcomes.append(str(error))
    policies = [outcome for outcome in outcomes if isinstance(outcome, Policy)]
    assert 0 < len(policies) < 250 and all(loads(dumps(policy)) == policy for policy in policies)


def large(points, evaluations, step):
    """JSON of so many points; `step`: JSON of every step but the first."""
    row = '{"error": 0.1, "steps": [{"action": "computed"}' + f", {step}" * (evaluations - 1) + "]}"
    head = json.loads(dumps(POLICY)) | {"sigmas": [0.5] * evaluations, "chosen": 0, "points": []}
    return json.dumps(head).replace('"points": []', f'"points": [{", ".join([row] * points)}]')


def test_a_file_with_too_many_steps_is_refused_before_they_are_looked_at():
    evaluations = 1000
    points = MAX_STEPS // evaluations
    with pytest.raises(PolicyError, match="101 points of 1000 steps; at most 100000"):
        loads(large(points + 1, evaluations, '"damaged"'))
    with pytest.raises(PolicyError, match="point 0: evaluation 1: it must be an object"):
        loads(large(points, evaluations, '"damaged"'))


@pytest.mark.parametrize("points, evaluations", [(MAX_STEPS // 1000, 1000), (1000, MAX_STEPS // 1000)])
def test_the_largest_policy_there_may_be_fits_into_a_file(points, evaluations):
    step = Step(Action.MIX, 1 / 3, 2 / 3)
    text = large(points, evaluations, json.dumps({"action": "mixed", "cost": step.cost, "mix": step.mix}))
    policy = loads(text)
    assert len(policy.points) == points and policy.steps == (Step(Action.COMPUTE), *[step] * (evaluations - 1))
    assert len(dumps(policy)) <= MAX_BYTES
