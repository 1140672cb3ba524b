"""The estimate of a picture's PSNR from the errors of its run: what it promises, and what it learns."""

import math

import numpy as np
import pytest

from fastercache_core.law import Law, constant

LAW = Law(30.0, between=3.0, within=5.0)
MODELS, PICTURES = 20_000, 50


def simulated(law: Law, pictures: int = PICTURES) -> np.ndarray:
    """Constants of pictures [MODELS, pictures] of models that no fit has seen."""
    chance = np.random.default_rng(7)
    means = chance.normal(law.mean, law.between, (MODELS, 1))
    return means + chance.normal(0, law.within, (MODELS, pictures))


def test_nine_of_ten_pictures_of_models_that_were_never_seen_are_above_what_is_promised() -> None:
    assert (simulated(LAW) > LAW.low).mean() == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("known", [1, 3, 20])
def test_after_some_pictures_of_a_model_nine_of_ten_of_its_further_ones_are_above(known: int) -> None:
    constants = simulated(LAW, known + PICTURES)
    above = [own[known:] > LAW.learnt(own[:known].tolist()).low for own in constants]
    assert np.mean(above) == pytest.approx(0.9, abs=0.005)


def test_on_average_a_model_that_is_known_is_promised_more() -> None:
    lows = [np.mean([LAW.learnt(own.tolist()).low for own in simulated(LAW, known)]) for known in (1, 3, 20)]
    assert [LAW.low, *lows] == sorted([LAW.low, *lows])


@pytest.mark.parametrize("constants", [[38.0], [38.0, 31.5], [22.0, 25.0, 24.0, 28.5]])
def test_what_is_learnt_is_the_posterior_of_the_models_own_mean(constants: list[float]) -> None:
    law, precision = LAW.learnt(constants), 1 / LAW.between**2 + len(constants) / LAW.within**2
    assert law.mean == pytest.approx((LAW.mean / LAW.between**2 + sum(constants) / LAW.within**2) / precision)
    assert law.between == pytest.approx(math.sqrt(1 / precision))
    assert (law.within, law.pictures) == (LAW.within, len(constants))
    assert law.low == pytest.approx(law.mean - 1.28155 * math.hypot(law.between, law.within), abs=1e-4)


def test_one_picture_moves_it_by_its_share_and_no_picture_by_nothing() -> None:
    assert LAW.learnt([LAW.mean + 3.4]).mean == pytest.approx(LAW.mean + 3.4 * 9 / 34)
    assert LAW.learnt([LAW.mean]).low > LAW.low, "a picture as expected makes it bolder, by what is certain now"
    assert LAW.learnt([]) == LAW


def test_pictures_may_come_one_after_the_other() -> None:
    together, one_by_one = LAW.learnt([35.0, 28.0, 33.0]), LAW.learnt([35.0]).learnt([28.0]).learnt([33.0])
    assert one_by_one.mean == pytest.approx(together.mean) and one_by_one.between == pytest.approx(together.between)
    assert one_by_one.pictures == together.pictures == 3


@pytest.mark.parametrize("target", [30.0, 42.0, 55.0])
def test_a_run_that_spends_its_whole_budget_is_promised_its_target(target: float) -> None:
    budget = LAW.budget(target)
    typical, low = LAW.closeness(budget)
    assert low == pytest.approx(target) and typical - low == pytest.approx(LAW.mean - LAW.low)
    assert constant(typical, budget) == pytest.approx(LAW.mean)
