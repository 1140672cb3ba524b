"""Auto-FR's gates close where outputs can be predicted and stay open where they cannot."""

import pytest
import torch

from fastercache_core.actions import Action
from fastercache_core.calibration import search
from fastercache_core.calibration.gradient import GapErrors, find_points, gates
from fastercache_core.calibration.losses import Losses, overall_rms
from support.recorded import COUNT, SHAPE, SIGMAS, fields, recorded


def line_then_noise():
    a, b, *noise = fields(COUNT + 2)
    return recorded(lambda s: a + b * s + (noise[SIGMAS.index(s)] if s < 0.5 else 0.0))


def errors_of(reference):
    return GapErrors(Losses(reference), overall_rms(reference.final))


def with_features(error):
    """A run whose outputs cannot be predicted, with features up to three evaluations old that are wrong by `error`."""
    noise = fields(COUNT, 1)
    reference = recorded(lambda s: noise[SIGMAS.index(s)], lambda s: noise[SIGMAS.index(s)] * 0.1)
    for key in range(COUNT):
        for m in range(key + 1, min(key + 3, COUNT - 2) + 1):
            cond, change = (values[m].reshape(SHAPE) for values in (reference.cond, reference.difference))
            reference.add_reused(key, m, cond + error * (m - key) * fields(1, m)[0], change)
    reference.reuse_cost = 0.4
    return reference


def test_where_features_are_good_and_forecasts_bad_closed_gates_reuse_features():
    reference = with_features(0.01)
    points = find_points(reference, Losses(reference))
    chosen = max((p for p in points if p.cost < 0.75), key=lambda p: p.cost)
    assert set(chosen.actions()) == {"C", "R"} and chosen.error < 0.05
    best = min(p.error for p in search.find_points(reference, Losses(reference)) if p.cost <= chosen.cost + 1e-9)
    assert chosen.error <= 1.2 * best + 0.01, "near to the best there is"


def test_where_features_are_bad_no_gate_reuses_them():
    reference = with_features(3.0)
    assert not any("R" in p.actions() for p in find_points(reference, Losses(reference)) if p.error < 0.3)


def test_the_gradient_of_gates_over_features_is_the_difference_that_opening_makes():
    reference = with_features(0.1)
    errors = GapErrors(Losses(reference), overall_rms(reference.final), Action.REUSE)
    alpha = torch.tensor([[1.0, *[1.0, 0.0] * 7, 1.0]], dtype=torch.float64, requires_grad=True)
    errors(alpha).sum().backward()
    both = alpha.detach().repeat(2, 1)
    both[:, 4] = torch.tensor([0.0, 1.0])
    closed, full = errors(both).tolist()
    assert float(alpha.grad[0, 4]) == pytest.approx(full - closed, abs=1e-9)


def test_gates_are_zero_or_one_open_at_both_ends_and_pass_the_gradient_of_the_sigmoid():
    theta = torch.tensor([[-1.0, 0.1, 2.0]], dtype=torch.float64, requires_grad=True)
    alpha = gates(theta)
    assert alpha.tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0]]
    alpha.sum().backward()
    soft = theta.detach().sigmoid()
    assert torch.allclose(theta.grad, soft * (1 - soft))


def opened(points):
    return torch.tensor([[float(step.action is Action.COMPUTE) for step in point.steps] for point in points]).double()


def test_the_error_of_any_gates_is_the_one_that_exact_search_goes_by():
    reference = line_then_noise()
    points = search.find_points(reference, Losses(reference))
    exact = [point for point in points if point.steps[-1].action is Action.COMPUTE]
    predicted = errors_of(reference)(opened(exact)).sqrt()
    assert len(exact) >= 6 and predicted.tolist() == pytest.approx([point.error for point in exact], abs=1e-6)


def test_the_gradient_of_a_gate_is_the_difference_that_opening_it_makes():
    errors = errors_of(line_then_noise())
    alpha = torch.tensor([[1.0, *[1.0, 0.0] * 7, 1.0]], dtype=torch.float64, requires_grad=True)
    errors(alpha).sum().backward()
    for m in range(1, COUNT - 1):
        both = alpha.detach().repeat(2, 1)
        both[:, m] = torch.tensor([0.0, 1.0])
        closed, full = errors(both).tolist()
        assert float(alpha.grad[0, m]) == pytest.approx(full - closed, abs=1e-9)
    assert alpha.grad.abs().max() > 1e-4


@pytest.mark.parametrize("computed, allowed", [([0, 7, 10, 15], False), ([0, 6, 10, 15], True)])
def test_skipping_more_in_a_row_than_exact_search_may_is_as_bad_as_losing_the_picture(computed, allowed):
    """Six in a row are skipped, or five; then three at most and four."""
    a, b = fields(2)
    errors = errors_of(recorded(lambda s: a + b * s))
    alpha = torch.zeros(1, COUNT, dtype=torch.float64)
    alpha[0, computed] = 1.0
    error = float(errors(alpha))
    assert error < 0.1 if allowed else 1.0 <= error < 1.1


@pytest.fixture(scope="module")
def points():
    reference = line_then_noise()
    with torch.inference_mode():  # as the host runs its nodes
        return find_points(reference, Losses(reference))


def test_at_every_cost_it_comes_near_to_the_best_there_is(points):
    reference = line_then_noise()
    compared = [p for p in search.find_points(reference, Losses(reference)) if 0.3 < p.cost < 0.95]
    assert len(compared) > 5
    for best in compared:
        ours = min(point.error for point in points if point.cost <= best.cost + 1e-9)
        assert ours <= 1.2 * best.error + 0.01


def test_evaluations_on_a_line_are_skipped_and_noisy_ones_computed(points):
    half = max((p for p in points if p.cost < 0.8), key=lambda p: p.cost)
    letters = half.actions()
    assert letters[:8].count("P") >= 4 and letters[9:].count("C") >= 6 and half.error < 0.05


def test_a_heavier_penalty_computes_less(points):
    costs, errors = [p.cost for p in points], [p.error for p in points]
    assert costs == sorted(costs) and errors == sorted(errors, reverse=True)
    assert costs[0] < 0.4 < 0.6 < costs[-1]
    assert all(p.steps[0].action is p.steps[-1].action is Action.COMPUTE for p in points)


def test_where_evaluations_may_not_be_skipped_the_difference_is():
    b, *rough = fields(COUNT + 1)
    reference = recorded(lambda s: rough[SIGMAS.index(s)], lambda s: b * s)
    points = find_points(reference, Losses(reference, (Action.ESTIMATE,)))
    *_, point = [p for p in points if p.cost < 0.8]
    assert set(point.actions()) == {"C", "E"} and point.error < 0.01
