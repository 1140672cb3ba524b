"""Auto-FR's gates close where outputs can be foreseen and stay open where they cannot."""
import pytest
import torch

from fastercache_core import calibration
from fastercache_core.autofr import GapErrors, find_points, gates
from fastercache_core.calibration import Losses, Reference, rms
from fastercache_core.clock import Clock

COUNT = 16
SIGMAS = [1.0 - i / COUNT for i in range(COUNT)]


def recorded(cond):
    reference, clock, x = Reference(3.0), Clock([*SIGMAS, 0.0]), torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    for sigma in SIGMAS:
        evaluation = clock.tick(sigma)
        reference.add(evaluation, -sigma, x, x - sigma * cond(sigma), cond(sigma), torch.zeros_like(x))
        x = x - evaluation.step * cond(sigma)
    return reference


def size_of(reference):
    return rms(reference.x[-1] - reference.slope[-1] * reference.sigmas[-1])


def fields(count):
    return torch.randn(count, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def line_then_noise():
    a, b, *noise = fields(COUNT + 2)
    return recorded(lambda s: a + b * s + (noise[SIGMAS.index(s)] if s < 0.5 else 0.0))


def test_gates_are_zero_or_one_open_at_both_ends_and_pass_the_gradient_of_the_sigmoid():
    theta = torch.tensor([[-1.0, 0.1, 2.0]], dtype=torch.float64, requires_grad=True)
    alpha = gates(theta)
    assert alpha.tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0]]
    alpha.sum().backward()
    soft = theta.detach().sigmoid()
    assert torch.allclose(theta.grad, soft * (1 - soft))


def opened(points):
    return torch.tensor([[float(step.action == "FULL") for step in point.steps] for point in points]).double()


def test_the_error_of_any_gates_is_the_one_that_exact_search_goes_by():
    reference = line_then_noise()
    losses = Losses(reference)
    exact = calibration.find_points(reference, losses)
    found = GapErrors(losses, size_of(reference))(opened(exact)).sqrt()
    assert found.tolist() == pytest.approx([point.error for point in exact], abs=1e-6)


def test_the_gradient_of_a_gate_is_the_difference_that_opening_it_makes():
    reference = line_then_noise()
    errors = GapErrors(Losses(reference), size_of(reference))
    alpha = torch.tensor([[1.0, *[1.0, 0.0] * 7, 1.0]], dtype=torch.float64, requires_grad=True)
    errors(alpha).sum().backward()
    for m in range(1, COUNT - 1):
        both = alpha.detach().repeat(2, 1)
        both[:, m] = torch.tensor([0.0, 1.0])
        closed, full = errors(both).tolist()
        assert float(alpha.grad[0, m]) == pytest.approx(full - closed, abs=1e-9)


def test_skipping_more_in_a_row_than_exact_search_may_is_as_bad_as_losing_the_picture():
    reference = line_then_noise()
    alpha = torch.zeros(1, COUNT, dtype=torch.float64)
    alpha[0, [0, 7, 10, -1]] = 1.0  # six in a row are skipped, then two and four
    assert float(GapErrors(Losses(reference), size_of(reference))(alpha)) >= 1.0


def test_at_every_cost_it_comes_near_to_the_best_there_is(points):
    reference = line_then_noise()
    exact = calibration.find_points(reference, Losses(reference))
    for best in (point for point in exact if 0.3 < point.cost < 0.95):
        ours = min(point.error for point in points if point.cost <= best.cost + 1e-9)
        assert ours <= 1.2 * best.error + 0.01


@pytest.fixture(scope="module")
def points():
    reference = line_then_noise()
    with torch.inference_mode():  # as the host runs its nodes
        return find_points(reference, Losses(reference))


def test_evaluations_on_a_line_are_skipped_and_noisy_ones_computed(points):
    half = max((p for p in points if p.cost < 0.8), key=lambda p: p.cost)
    letters = half.actions()
    assert letters[:8].count("J") >= 4 and letters[9:].count("F") >= 6 and half.error < 0.05


def test_a_heavier_penalty_computes_less(points):
    costs, errors = [p.cost for p in points], [p.error for p in points]
    assert costs == sorted(costs) and errors == sorted(errors, reverse=True)
    assert costs[0] < 0.4 < 0.6 < costs[-1]
    assert all(p.steps[0].action == p.steps[-1].action == "FULL" for p in points)


def test_where_evaluations_may_not_be_skipped_the_difference_is():
    a, b = fields(2)
    reference, clock = Reference(3.0), Clock([*SIGMAS, 0.0])
    for sigma in SIGMAS:
        reference.add(clock.tick(sigma), -sigma, a, a, torch.randn_like(a), b * sigma)
    points = find_points(reference, Losses(reference, ("ESTIMATE",)))
    *_, point = [p for p in points if p.cost < 0.8]
    assert set(point.actions()) == {"F", "E"} and point.error < 0.01
