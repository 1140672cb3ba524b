"""The file of what was learnt on a model: small, readable, and checked before it is believed."""

import json
from typing import Any

import pytest

from fastercache_core.calibration.learnt_file import KEPT, MAX_BYTES, Learnt, LearntError, dumps, kind, loads

MODEL, EULER = "SD3 9.1M 3f2a90bc", "euler, 13 to 24 steps"
LEARNT = Learnt(MODEL).adding(EULER, [31.256, 28.0]).adding("dpmpp_2m, 25 and more steps", [24.5])


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(dumps(LEARNT)), **fields})


@pytest.mark.parametrize(
    "steps, name", [(4, "up to 12"), (12, "up to 12"), (13, "13 to 24"), (24, "13 to 24"), (25, "25 and more")]
)
def test_runs_are_of_one_kind_by_sampler_and_steps(steps: int, name: str) -> None:
    assert kind("sample_euler", steps) == f"euler, {name} steps"


def test_what_is_written_is_read() -> None:
    assert loads(dumps(LEARNT), MODEL) == LEARNT
    assert LEARNT.of(EULER) == (31.26, 28.0) and LEARNT.of("heun, up to 12 steps") == ()
    assert loads(dumps(Learnt(MODEL)), MODEL) == Learnt(MODEL)


def test_a_person_can_read_it() -> None:
    assert f'    "{EULER}": [31.26, 28.0],' in dumps(LEARNT).splitlines()


def test_the_newest_pictures_are_kept() -> None:
    many = Learnt(MODEL)
    for i in range(KEPT + 3):
        many = many.adding(EULER, [float(i)])
    assert many.of(EULER) == tuple(float(i) for i in range(3, KEPT + 3))
    assert loads(dumps(many), MODEL) == many


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        ("[]", "did not write it"),
        (changed(format="fastercache policy"), "did not write it"),
        (changed(version=2), "version 2, this pack reads version 1"),
        (changed(model="SD3 9.1M 00000000"), "another model, SD3 9.1M 00000000"),
        (changed(constants=None), "must be an object"),
        (changed(constants={EULER: 31.0}), "must be at most"),
        (changed(constants={EULER: ["31"]}), "must be at most"),
        (changed(constants={EULER: [True]}), "must be at most"),
        (changed(constants={EULER: [float("nan")]}), "must be at most"),
        (changed(constants={EULER: [1e9]}), "must be at most"),
        (changed(constants={EULER: [1.0] * (KEPT + 1)}), "must be at most"),
        (" " * (MAX_BYTES + 1), "more than"),
    ],
)
def test_a_broken_or_foreign_file_is_refused_in_one_sentence(text: str | bytes, reason: str) -> None:
    with pytest.raises(LearntError, match=reason) as error:
        loads(text, MODEL)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
