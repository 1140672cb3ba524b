"""Gains of many features, fitted together: each feature and picture keeps its own."""

import pytest
import torch

from fastercache_core.features.gains import FEATURE_PRIOR, Gains

SIGMAS, SIGMA = (0.7, 0.8, 0.9), 0.6


def learned(values):
    """Gains that compared `values` ({key: share of the way}) with three outputs on a straight line."""
    gains = Gains()
    for key, way in values.items():
        past = [torch.full((1, 2), x) for x in (3.0, 2.0, 1.0)]
        gains.learn(key, past[0] + way, past, SIGMAS, SIGMA, 0)
    return gains


def first_step(gains, key):
    return gains.steps(key, SIGMAS[:2], SIGMA, torch.ones(1)).flatten().tolist()


def test_each_feature_has_its_own_gain_half_way_between_what_it_did_and_what_is_usual():
    gains = learned({"all the way": 1.0, "half of it": 0.5, "not at all": 0.0})
    for key, way in (("all the way", 1.0), ("half of it", 0.5), ("not at all", 0.0)):
        assert first_step(gains, key) == pytest.approx([(way + FEATURE_PRIOR[0]) / 2], abs=1e-4)


def test_a_feature_that_was_not_compared_yet_goes_the_usual_way():
    assert first_step(learned({"another": 0.0}), "new") == pytest.approx([FEATURE_PRIOR[0]])


def test_what_is_learned_after_a_forecast_counts_in_the_next_one():
    gains = learned({"feature": 1.0, "other": 0.5})
    before = first_step(gains, "feature"), first_step(gains, "other")
    past = [torch.full((1, 2), x) for x in (3.0, 2.0, 1.0)]
    gains.learn("feature", past[0], past, SIGMAS, SIGMA, 0)
    # 1 * what was usual + (0.5 of the older comparison's whole way, 1 of no way at all) / 1.5, each half
    assert first_step(gains, "feature") == pytest.approx([(1.0 + 0.5 / 1.5) / 2], abs=1e-4)
    assert first_step(gains, "other") == before[1]


def test_pictures_of_one_feature_learn_apart_whatever_shapes_other_features_have():
    gains = Gains()
    for key, pictures in (("two", 2), ("three", 3)):
        past = [torch.full((pictures, 4), x) for x in (3.0, 2.0, 1.0)]
        ways = torch.arange(float(pictures))[:, None] / 2
        gains.learn(key, past[0] + ways, past, SIGMAS, SIGMA, 0)
    assert first_step(gains, "two") == pytest.approx([0.5, 0.75], abs=1e-4)
    assert first_step(gains, "three") == pytest.approx([0.5, 0.75, 1.0], abs=1e-4)


def test_a_forgotten_feature_starts_anew_and_the_others_stay():
    gains = learned({"gone": 0.0, "kept": 0.0})
    assert first_step(gains, "gone") == first_step(gains, "kept") == pytest.approx([0.5], abs=1e-4)
    gains.forget(lambda key: key == "gone")
    assert first_step(gains, "gone") == pytest.approx([FEATURE_PRIOR[0]])
    assert first_step(gains, "kept") == pytest.approx([0.5], abs=1e-4)


def test_the_steps_go_to_the_parabola_through_three_outputs_as_far_as_the_usual_gains_say():
    values = lambda sigma: 1 + 2 * sigma + 30 * sigma**2
    newest, older, oldest = map(values, SIGMAS)
    near, far = Gains().steps("feature", SIGMAS, SIGMA, torch.ones(1)).flatten().tolist()
    line = newest + (newest - older)
    expected = line + FEATURE_PRIOR[1] * (values(SIGMA) - line)
    assert newest + near * (newest - older) + far * (older - oldest) == pytest.approx(expected, rel=1e-4)
