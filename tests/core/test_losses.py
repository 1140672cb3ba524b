"""Calibration finds where skipping is free, what it costs elsewhere, and weights that undo an error."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastercache_core.actions import COMPUTE, Action
from fastercache_core.calibration import losses as losses_module
from fastercache_core.calibration.losses import Losses, Reference, fit, pareto, prior_weights, subsample
from fastercache_core.calibration.search import find_points
from fastercache_core.clock import Evaluation
from fastercache_core.solvers import SOLVERS
from support.recorded import CFG, COUNT, SHAPE, SIGMAS, fields, recorded, smooth_then_rough


def computed(point):
    return [i for i, step in enumerate(point.steps) if step.action is Action.COMPUTE]


def at(points, cost):
    return [p for p in points if p.cost <= cost + 1e-9][-1]


def test_what_can_be_predicted_is_skipped_and_what_cannot_is_computed():
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
    assert len(points) >= 6 and errors[0] > 0.01


def test_the_predicted_error_is_that_of_sampling_with_those_forecasts():
    """One skipped segment, played on the recorded outputs: the latent moves by what was predicted."""
    reference = smooth_then_rough()
    keys, following = (8, 6, 5), 11
    [choice] = Losses(reference).choices(keys, following)
    change = 0.0
    for m in range(9, 11):
        values = [reference.cond[k] for k in keys] + [(1 - CFG) * reference.difference[k] for k in keys]
        true = reference.cond[m] + (1 - CFG) * reference.difference[m]
        weights = fit(values, true, [SIGMAS[k] for k in keys], SIGMAS[m])
        forecast = sum(w * v for w, v in zip(weights, values))
        change = change + reference.steps[m] * (forecast - true)
    assert choice.loss == pytest.approx(float(change.pow(2).mean()), rel=1e-3) and choice.loss > 1e-4
    assert choice.actions == (Action.PREDICT, Action.PREDICT) and choice.units == 0


def test_the_unconditional_pass_alone_is_skipped_where_that_pays():
    """Here only the conditional output is rough: running it alone gives everything."""
    reference = smooth_then_rough()
    points = find_points(reference, Losses(reference, (Action.PREDICT, Action.ESTIMATE)))
    letters = at(points, 0.5).actions()
    assert "E" in letters[8:] and "E" not in letters[:8]
    assert at(points, 0.5).error < 0.8 * at(find_points(reference, Losses(reference)), 0.5).error


def with_reuse(reference, error, cost=0.25):
    """The same run with reused features: error(k, m), of SHAPE, is what they are wrong by."""
    reference.reuse_cost = cost
    for k in range(COUNT):
        for m in range(k + 1, min(k + 4, COUNT)):
            cond = reference.cond[m].reshape(SHAPE) + error(k, m)
            reference.add_reused(k, m, cond, reference.difference[m].reshape(SHAPE))
    return reference


def test_features_are_reused_where_that_beats_the_forecast():
    reference = with_reuse(smooth_then_rough(), lambda k, m: torch.zeros(SHAPE))
    point = at(find_points(reference, Losses(reference)), 0.5)
    letters = point.actions()
    assert letters[8:].count("R") > 3 and letters[:8].count("R") <= 1 and point.error < 0.05
    assert next(s for s in point.steps if s.action is Action.REUSE).cost == 0.25


def test_a_mix_has_the_lambda_of_least_error():
    """Reused features are wrong by as much as the forecast is, the other way: half of each is right."""
    reference = smooth_then_rough()
    keys, m = (10, 9, 8), 11
    forecast, _ = Losses(reference).ways(keys, m)[Action.PREDICT]
    values = torch.stack([*reference.cond, *(d * (1 - CFG) for d in reference.difference)])
    error = torch.tensordot(torch.from_numpy(forecast / Losses(reference).effects[m]).float(), values, 1)
    reference.add_reused(10, m, reference.cond[m] + error, reference.difference[m])
    losses = Losses(reference)
    mixed, share = losses.ways(keys, m)[Action.MIX]
    assert share == pytest.approx(0.5, abs=1e-3)
    assert mixed @ losses.products @ mixed == pytest.approx(0.0, abs=1e-9)
    [*_, step] = losses.steps([Action.COMPUTE] * 11 + [Action.MIX])
    assert step.action is Action.MIX and step.mix == pytest.approx(share)


def test_errors_of_one_key_evaluation_add_up_as_vectors():
    """The same stale features are wrong in the same way twice: that is twice the error, four times the loss."""
    [stale] = 0.1 * fields(1, 5)
    reference = with_reuse(smooth_then_rough(), lambda k, m: stale)
    losses = Losses(reference)
    once, twice = (
        next(c.loss for c in losses.choices((8, 7, 6), following) if set(c.actions) == {Action.REUSE})
        for following in (10, 11)
    )
    assert twice == pytest.approx(4 * once, rel=1e-3) and once > 1e-6


def test_errors_can_be_scaled_per_evaluation_and_the_original_stays():
    losses = Losses(smooth_then_rough())
    [before] = losses.choices((8, 7, 6), 10)
    [after] = losses.scaled([2.0] * COUNT).choices((8, 7, 6), 10)
    assert after.loss == pytest.approx(4 * before.loss) and losses.choices((8, 7, 6), 10) == [before]


def test_without_a_negative_the_conditional_output_alone_is_compared():
    [x] = fields(1)
    reference = recorded(lambda s: x * s)
    assert torch.equal(reference.guided(x, None), subsample(x))
    assert at(find_points(reference, Losses(reference)), 0.5).error < 0.01


def test_a_policy_computes_where_it_is_told_and_costs_what_it_takes():
    reference = smooth_then_rough()
    steps = Losses(reference, (Action.PREDICT, Action.ESTIMATE)).steps(
        [Action.COMPUTE, Action.ESTIMATE, Action.PREDICT]
    )
    assert steps[0] == COMPUTE and [step.cost for step in steps] == [1.0, 0.5, 0.0]


def test_only_what_is_better_than_everything_cheaper_stays():
    assert pareto([(0, 1.0), (1, 0.1), (2, 0.5), (3, 0.1), (4, 0.0)], lambda e: e[1]) == [(0, 1.0), (1, 0.1), (4, 0.0)]


def test_fitted_weights_find_a_rule_that_no_polynomial_has():
    a, b = fields(2)
    weights = fit([a, b], 3.0 * a - 0.5 * b, [0.5, 0.6], 0.4)
    assert weights == pytest.approx([3.0, -0.5], abs=0.05)


def test_where_the_values_say_nothing_the_polynomial_is_used():
    zero = torch.zeros(2, 8)
    assert fit([zero, zero], zero, [0.5, 0.6], 0.4) == pytest.approx([2.0, -1.0])


def test_the_target_leads_a_strayed_latent_back_in_one_step():
    reference = recorded(lambda s: fields(1)[0] * s, lambda s: fields(1, 2)[0])
    strayed = reference.x[5].reshape(SHAPE) + 0.1 * fields(1, 3)[0].float()
    target = reference.target(5, strayed, strayed, -SIGMAS[5])
    arrived = subsample(strayed) - reference.steps[5] * target  # Euler on a flow model
    assert torch.allclose(arrived, reference.x[6], atol=1e-5)


def test_the_target_takes_back_what_a_sampler_uses_once_more():
    """A second-order sampler adds the denoised latent of the evaluation before: there it was off by `wrong`."""
    reference = recorded(lambda s: fields(1)[0] * s)
    reference.solver = SOLVERS["sample_res_multistep"]
    wrong = 0.1 * subsample(fields(1, 3)[0])
    x, sigma = reference.x[5].reshape(SHAPE), SIGMAS[5]
    target = reference.target(5, x, x, -sigma, wrong)
    weight, before = reference.step_weights(5)
    moved = weight * (reference.x[5] - sigma * target - reference.denoised(5)) + before * wrong
    assert before < 0 and torch.allclose(moved, torch.zeros_like(moved), atol=1e-5)


def test_an_error_counts_less_where_the_next_evaluation_corrects_it():
    a, b = fields(2)
    reference = recorded(lambda s: a * math.sin(12 * s) + b * math.cos(15 * s))
    [alone] = Losses(reference).choices((4,), 6)
    reference.solver = SOLVERS["sample_euler"]
    [corrected] = Losses(reference).choices((4,), 6)
    [at_the_end] = Losses(reference).choices((14, 13, 12), COUNT)
    assert 0 < corrected.loss < 0.9 * alone.loss and at_the_end.actions == (Action.PREDICT,)


def test_the_final_latent_is_the_last_denoised_one():
    [x] = fields(1)
    reference = Reference(CFG)
    reference.add(Evaluation(0, 0.5, 1.0, True, 0.5, (0.0,)), -0.5, x, 0.25 * x, x, None)
    assert torch.allclose(reference.final, 0.25 * subsample(x), atol=1e-6)


def test_large_latents_are_sampled_at_the_same_places_every_time():
    x = torch.arange(2 * 600_000).reshape(2, 600_000).float()
    picked = subsample(x)
    assert picked.shape == (2, 2**18) and torch.equal(picked, subsample(x))
    assert torch.equal(picked[1] - picked[0], torch.full_like(picked[0], 600_000.0))


@pytest.mark.parametrize("batch, elements", [(1, 2**18), (4, 2**18), (8, 2**17), (64, 2**14)])
def test_what_is_recorded_does_not_grow_beyond_four_pictures(batch, elements):
    large = torch.zeros(1).expand(batch, 16, 160, 160)
    assert subsample(large).shape == (batch, elements)


def test_a_recorded_run_of_many_pictures_stays_small():
    """64 pictures: with every tensor of a full evaluation, and an output with reused features."""
    large = torch.zeros(1).expand(64, 4, 128, 128)
    reference = Reference(CFG)
    reference.add(Evaluation(0, 1.0, 0.0, False, 0.5, (0.5,)), -1.0, large, large, large, large)
    reference.add_reused(0, 1, large, large)
    tensors = [reference.x[0], reference.slope[0], reference.cond[0], reference.difference[0], reference.reused[0, 1]]
    assert sum(x.numel() * x.element_size() for x in tensors) <= 5 * 4 * 2**20


class LargestDouble(TorchDispatchMode):
    """Elements of the largest float64 tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


def test_products_are_summed_in_parts_that_bound_the_memory(monkeypatch):
    reference = with_reuse(smooth_then_rough(), lambda k, m: 0.1 * fields(1, k)[0])
    whole = reference.products()
    count = len(whole)
    monkeypatch.setattr(losses_module, "CHUNK", 100 * count)
    with LargestDouble() as seen:
        parts = reference.products()
    assert parts == pytest.approx(whole, rel=1e-12, abs=1e-12)
    assert 0 < seen.elements <= max(100 * count, count * count) < reference.cond[0].numel() * count


def test_a_sigma_that_a_sampler_visits_twice_is_no_obstacle():
    weights = prior_weights([0.5, 0.5, 0.7], 0.4)
    assert weights[1] == 0.0 and sum(weights) == pytest.approx(1.0)
    assert weights[0] == pytest.approx(1.5) and weights[2] == pytest.approx(-0.5)
