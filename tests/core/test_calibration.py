"""Calibration finds where skipping is free, what it costs elsewhere, and weights that undo an error."""
import pytest
import torch

from fastercache_core.calibration import DEPTH, Losses, Reference, find_points, fit, take
from fastercache_core.clock import Clock

COUNT, CFG = 16, 3.0
SIGMAS = [1.0 - i / COUNT for i in range(COUNT)]


def fields(count, seed=0):
    return torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(cond, difference):
    """A Reference of a flow model (Euler) whose outputs are the given functions of sigma."""
    reference, clock, x = Reference(CFG), Clock([*SIGMAS, 0.0]), fields(1, 9)[0]
    for sigma in SIGMAS:
        evaluation = clock.tick(sigma)
        slope = cond(sigma) + (1 - CFG) * difference(sigma)
        reference.add(evaluation, -sigma, x, x - sigma * slope, cond(sigma), difference(sigma))
        x = x - evaluation.step * slope
    return reference


def smooth_then_rough():
    """Outputs on a straight line, except for noise in the second half."""
    a, b = fields(2)
    noise = dict(zip(SIGMAS, fields(COUNT, 1)))
    return sampled(lambda s: a + b * s + (noise[s] if s < 0.5 else 0.0), lambda s: b * (1 - s))


def computed(point):
    return [i for i, step in enumerate(point.steps) if step.action == "FULL"]


def at(points, cost):
    return [p for p in points if p.cost <= cost + 1e-9][-1]


def test_what_can_be_foreseen_is_skipped_and_what_cannot_is_computed():
    reference = smooth_then_rough()
    half = at(find_points(reference, Losses(reference)), 0.6)
    keys = computed(half)
    assert sum(k >= 8 for k in keys) > sum(k < 8 for k in keys)
    assert len([k for k in keys if k < 8]) <= 3


def test_more_budget_means_less_error_and_in_the_end_none():
    reference = smooth_then_rough()
    points = find_points(reference, Losses(reference))
    costs, errors = [p.cost for p in points], [p.error for p in points]
    assert costs == sorted(costs) and errors == sorted(errors, reverse=True) and points[-1].error == 0.0


def test_the_foreseen_error_is_that_of_sampling_with_those_forecasts():
    """One skipped segment, played on the recorded outputs: the latent moves by what was foreseen."""
    reference = smooth_then_rough()
    keys, following = (6, 4, 3), 9
    [choice] = Losses(reference).choices(keys, following)
    change = 0.0
    for m in range(7, 9):
        values = [reference.cond[k] for k in keys] + [(1 - CFG) * reference.difference[k] for k in keys]
        true = reference.cond[m] + (1 - CFG) * reference.difference[m]
        weights = fit(values, true, [SIGMAS[k] for k in keys], SIGMAS[m])
        forecast = sum(w * v for w, v in zip(weights, values))
        change = change + reference.steps[m] * (forecast - true)
    assert choice.loss == pytest.approx(float(change.pow(2).mean()), rel=1e-3)
    assert choice.actions == ("JUMP", "JUMP") and choice.units == 0


def test_estimates_are_bought_only_where_they_are_worth_it():
    """Here only the conditional output is rough: running it alone gives everything."""
    reference = smooth_then_rough()
    points = find_points(reference, Losses(reference, ("JUMP", "ESTIMATE")))
    letters = at(points, 0.5).actions()
    assert "E" in letters[8:] and "E" not in letters[:8]
    assert at(points, 0.5).error < 0.8 * at(find_points(reference, Losses(reference)), 0.5).error


def with_reuse(reference, error, cost=0.25):
    """The same run, in which reused features were tried: error(k, m) [2, 4, 8, 8] is what they are wrong by."""
    reference.reuse_cost = cost
    for k in range(COUNT):
        for m in range(k + 1, min(k + 4, COUNT)):
            shape = (2, 4, 8, 8)
            cond = reference.cond[m].reshape(shape) + error(k, m)
            reference.add_reused(k, m, cond, reference.difference[m].reshape(shape))
    return reference


def test_features_are_reused_where_that_beats_the_forecast():
    reference = with_reuse(smooth_then_rough(), lambda k, m: torch.zeros(2, 4, 8, 8))
    point = at(find_points(reference, Losses(reference)), 0.5)
    letters = point.actions()
    assert letters[8:].count("R") > 3 and "R" not in letters[:7] and point.error < 0.05
    assert next(s for s in point.steps if s.action == "REUSE").cost == 0.25


def test_a_mix_has_the_lambda_of_least_error():
    """Reused features are wrong by as much as the forecast is, the other way: half of each is right."""
    reference = smooth_then_rough()
    keys, m = (8, 7, 6), 9
    forecast, _ = Losses(reference).ways(keys, m)["JUMP"]
    values = torch.stack([*reference.cond, *(d * (1 - CFG) for d in reference.difference)])
    error = torch.tensordot(torch.from_numpy(forecast / Losses(reference).effects[m]).float(), values, 1)
    reference.add_reused(8, m, reference.cond[m] + error, reference.difference[m])
    losses = Losses(reference)
    mixed, share = losses.ways(keys, m)["MIX"]
    assert share == pytest.approx(0.5, abs=1e-3)
    assert mixed @ losses.products @ mixed == pytest.approx(0.0, abs=1e-9)
    [*_, step] = losses.steps(("FULL",) * 9 + ("MIX",))
    assert step.action == "MIX" and step.mix == pytest.approx(share)


def test_errors_of_one_key_evaluation_add_up_as_vectors():
    """The same stale features are wrong in the same way twice: that is twice the error, four times the loss."""
    [stale] = 0.1 * fields(1, 5)
    reference = with_reuse(smooth_then_rough(), lambda k, m: stale)
    losses = Losses(reference)
    once, twice = (next(c.loss for c in losses.choices((8, 7, 6), following) if set(c.actions) == {"REUSE"})
                   for following in (10, 11))
    assert twice == pytest.approx(4 * once, rel=1e-3)


def test_without_a_negative_the_conditional_output_alone_is_weighed():
    reference, clock, x = Reference(1.0), Clock([*SIGMAS, 0.0]), fields(1)[0]
    for sigma in SIGMAS:
        reference.add(clock.tick(sigma), -sigma, x, x * (1 - sigma * sigma), x * sigma, None)
    assert at(find_points(reference, Losses(reference)), 0.5).error < 0.01


def test_fitted_weights_find_a_rule_that_no_polynomial_has():
    a, b = fields(2)
    weights = fit([a, b], 3.0 * a - 0.5 * b, [0.5, 0.6], 0.4)
    assert weights == pytest.approx([3.0, -0.5], abs=0.05)


def test_where_the_values_say_nothing_the_polynomial_is_kept():
    zero = torch.zeros(2, 8)
    assert fit([zero, zero], zero, [0.5, 0.6], 0.4) == pytest.approx([2.0, -1.0])


def test_the_target_leads_a_strayed_latent_back_in_one_step():
    reference = sampled(lambda s: fields(1)[0] * s, lambda s: fields(1, 2)[0])
    strayed = reference.x[5].reshape(2, 4, 8, 8) + 0.1 * fields(1, 3)[0].float()
    target = reference.target(5, strayed, strayed, -SIGMAS[5])
    arrived = take(strayed) - reference.steps[5] * target  # Euler on a flow model
    assert torch.allclose(arrived, reference.x[6], atol=1e-5)


def test_large_latents_are_sampled_at_the_same_places_every_time():
    x = torch.arange(2 * 600_000).reshape(2, 600_000).float()
    kept = take(x)
    assert kept.shape[1] < 600_000 and torch.equal(kept, take(x))
    assert torch.equal(kept[1] - kept[0], torch.full_like(kept[0], 600_000.0))


def test_a_forecast_looks_back_at_most_three_values():
    reference, seen = smooth_then_rough(), set()
    losses = Losses(reference)
    original = losses.choices
    losses.choices = lambda keys, following: seen.add(len(keys)) or original(keys, following)
    find_points(reference, losses)
    assert max(seen) == DEPTH == 3
