"""The arithmetic of `bench promise`: laws fitted without the model that they are judged by."""

import math

import pytest

from benchmarks.promise import Record, Sampling, fitted, judged, shares
from fastercache_core.solvers import EULER

SAMPLING = Sampling("euler", 20)


def record(bed: str, constant: float, prompts: str = "tuning", wish: float = 42.0, spent: float = 0.01) -> Record:
    """A picture that shows this constant in dB."""
    return Record(bed, prompts, SAMPLING, wish, 0.5, constant - 10 * math.log10(spent), spent)


def test_relatives_count_as_one_model() -> None:
    alone = fitted([record("mmdit", 30.0), record("wan", 34.0)])
    related = fitted([record("mmdit", 29.0), record("mmdit_turbo8", 31.0), record("wan", 34.0)])
    assert alone and related and (alone.mean, alone.between) == (related.mean, related.between) == (32.0, math.sqrt(8))


def test_pictures_of_one_model_scatter_within_it() -> None:
    law = fitted([record("mmdit", 28.0), record("mmdit", 32.0), record("wan", 30.0), record("wan", 34.0)])
    assert law and (law.mean, law.within) == (31.0, 2.0)


def test_one_model_says_nothing_of_others() -> None:
    assert fitted([record("mmdit", 30.0), record("mmdit_turbo8", 31.0)]) is None


def test_what_skipped_nothing_or_is_too_close_does_not_count() -> None:
    base = [record("mmdit", 30.0), record("wan", 34.0)]
    equal = Record("mmdit", "tuning", SAMPLING, 42.0, 1.0, None, None)
    assert fitted([*base, equal, record("mmdit", 45.0)]) == fitted(base), "65 dB"


def test_the_model_that_is_judged_and_its_relatives_take_no_part_in_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.promise.law_in_use", lambda kind: EULER)
    others = [record("unet", 30.0), record("wan", 34.0)]
    report = record("mmdit", 31.0, "report")
    [(_, wish)] = judged([*others, report], "euler")
    [(_, same), *_] = judged([*others, record("mmdit", 10.0), record("mmdit_turbo8", 11.0), report], "euler")
    law = fitted(others)
    assert law and wish == same == pytest.approx(42.0 + law.low - EULER.low), "a bolder law makes it of a higher wish"


def test_shares_are_told_for_each_class_and_all() -> None:
    met, missed = record("mmdit", 31.0, "report"), record("mmdit", 15.0, "report", wish=50.0)
    assert shares([(met, 42.0), (missed, 50.0)], lambda r: f"{r.wish:g}") == {
        "42": "100% of 1",
        "all": "50% of 2",
        "50": "0% of 1",
    }
