"""Auto-FR's gates close where outputs can be foreseen and stay open where they cannot."""
import pytest
import torch

from fastercache_core.autofr import find_points, gates, squared_error
from fastercache_core.calibration import Losses, Reference
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


def test_the_error_is_that_of_sampling_with_lines_through_the_last_two_computed_values():
    reference = line_then_noise()
    losses = Losses(reference)
    opened = [True, True, False, True, False, False, True, True, True, False, *[True] * 6]
    change, known = 0.0, []
    for m, is_open in enumerate(opened):
        true = reference.cond[m].double()
        if is_open:
            known = [(SIGMAS[m], true), *known[:1]]
        else:
            (s0, v0), (s1, v1) = known
            change = change + reference.steps[m] * (v0 + (SIGMAS[m] - s0) / (s0 - s1) * (v0 - v1) - true)
    alpha = torch.tensor([opened], dtype=torch.float64)
    products = torch.from_numpy(losses.products[:COUNT, :COUNT])
    assert float(squared_error(alpha, products, SIGMAS, losses.effects)) == pytest.approx(float(change.pow(2).mean()))


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
