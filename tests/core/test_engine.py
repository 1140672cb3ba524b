"""The engine on a fake network: what runs, what is reused, estimated and predicted, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastercache_core.actions import COMPUTE, COSTS, Action, Step
from fastercache_core.clock import Evaluation, Interval, Window
from fastercache_core.controllers.adaptive import AdaptiveSettings
from fastercache_core.controllers.interval import IntervalSettings
from fastercache_core.controllers.planned import MixSettings, PlannedController, StepsPlan, StepsSettings
from fastercache_core.features.reuse import planned_reuse
from fastercache_core.forecast import FORECASTERS
from fastercache_core.protocols import (
    Controller,
    ControllerSettings,
    FeatureUse,
    Network,
    Pass,
    Result,
    RunContext,
    Signals,
)
from fastercache_core.settings import CacheSettings
from fastercache_core.signal import DifferenceSettings, OutputSettings
from fastercache_core.solvers import SOLVERS, Solver
from support import grids
from support.engine import FULL, Model, Run, Sampling, all_on, error
from support.samplers import SAMPLERS

CORRECTED = [name for name, solver in SOLVERS.items() if solver.corrects]
PREDICTING = IntervalSettings(predict=Interval(2))
ESTIMATING = IntervalSettings(estimate=Interval(2))
LETTERS = {action.letter: Step(action, COSTS.get(action, 0.0)) for action in Action}


def steps(letters: str, sigmas: Sequence[float] | None = None, fewest: int | None = None) -> StepsSettings:
    """A plan by letters; the rest of the run is computed."""
    return StepsSettings(list(zip(sigmas or grids.even(30), (LETTERS[letter] for letter in letters))), fewest)


@dataclass(frozen=True)
class Corrected:
    """A plan whose errors are corrected where the solver allows it."""

    letters: str
    corrects, probes, longest_reuse = True, False, None
    reference_only, holds_slope, uses_errors, weighs = False, False, False, False

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, None]:
        return self, None

    def controller(self, context: RunContext) -> Controller:
        plan = list(zip(context.sigmas, (LETTERS[letter] for letter in self.letters)))
        return PlannedController(StepsPlan(plan))


# Nothing skipped


NOTHING = {
    "nothing is on": FULL,
    "no interval": all_on(IntervalSettings()),
    "every evaluation": all_on(IntervalSettings(Interval(1), Interval(1))),
    "an empty window": all_on(IntervalSettings(Interval(3, Window(1.0, 1.0)), Interval(3, Window(1.0, 1.0)))),
    "no tolerance": all_on(IntervalSettings(Interval(3), Interval(3), tolerance=0.0)),
    "an unreachable target": all_on(AdaptiveSettings(300.0), "hedged"),
    "a plan that computes": all_on(steps("C" * 30)),
    "keyframes only": all_on(MixSettings(every=1), reuse=True),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_is_skipped_the_result_is_exactly_that_of_full_sampling(name: str, sampler: str) -> None:
    sampling = Sampling(sampler=sampler)
    run = sampling.run(NOTHING[name])
    assert {*run.letters} == {"C"} and torch.equal(run.latent, sampling.full())
    assert run.rows == len(run.outcomes) * 2 * 2, "two branches of two pictures"


# Each controller skips what it says


def test_intervals_predict_every_second_evaluation_once_enough_is_known() -> None:
    run = Sampling().run(all_on(PREDICTING))
    assert run.letters == "CCC" + "PC" * 13 + "C" and run.rows == 4 * run.count(Action.COMPUTE)
    assert error(run) < 1e-3
    assert all({*outcome.actions.values()} == {outcome.action} for outcome in run.outcomes)


def test_intervals_estimate_by_running_the_reference_alone() -> None:
    run = Sampling().run(all_on(ESTIMATING))
    assert run.letters == "CCC" + "EC" * 13 + "C" and error(run) < 1e-3
    ran = [branches for _, branches in run.network.calls]
    assert ran == [(0,) if letter == "E" else (0, 1) for letter in run.letters]
    assert run.rows == 4 * run.count(Action.COMPUTE) + 2 * run.count(Action.ESTIMATE)
    estimated = next(outcome for outcome in run.outcomes if outcome.action is Action.ESTIMATE)
    assert estimated.actions == {0: Action.COMPUTE, 1: Action.ESTIMATE}


def test_where_both_are_wanted_predicting_goes_first() -> None:
    run = Sampling().run(all_on(IntervalSettings(Interval(2, Window(0.5, 1.0)), Interval(3))))
    assert "P" not in run.letters[:14] and "E" in run.letters[:15] and "P" in run.letters[15:]


def test_intervals_reuse_features_where_nothing_is_estimated() -> None:
    run = Sampling().run(CacheSettings("features", reuse=planned_reuse()))
    assert run.letters == "C" + "R" * 29, "the cache says how long; the engine asks for it"
    assert {use for use, _ in run.network.calls} == {FeatureUse.REUSE}


def test_beside_estimates_only_the_reference_alone_reuses_features() -> None:
    """A difference means nothing between branches that were computed in different ways."""
    settings = replace(all_on(ESTIMATING, reuse=True), output=None)
    run = Sampling().run(settings)
    for outcome, (use, _) in zip(run.outcomes, run.network.calls):
        assert use is (FeatureUse.REUSE if outcome.action is Action.ESTIMATE else FeatureUse.STORE)
    estimated = next(outcome for outcome in run.outcomes if outcome.action is Action.ESTIMATE)
    assert estimated.actions == {0: Action.REUSE, 1: Action.ESTIMATE}


def test_a_tolerance_waits_until_forecasts_are_good_enough() -> None:
    def surprise(sigma: float) -> float:
        return 1.0 if sigma > 0.6 else 0.0

    run = Sampling(Model(surprise=surprise)).run(all_on(IntervalSettings(Interval(2), tolerance=0.01)))
    without = Sampling(Model(surprise=surprise)).run(all_on(PREDICTING))
    assert "P" in without.letters[:12] and "P" not in run.letters[:12] and "P" in run.letters[18:]
    assert error(run) < 0.15 * error(without)


def test_a_higher_target_computes_more_and_comes_closer() -> None:
    runs = [
        Sampling(Model(surprise=lambda s: 0.02)).run(all_on(AdaptiveSettings(t), "hedged")) for t in (30, 45, 60, 80)
    ]
    counts, errors = [run.count(Action.COMPUTE) for run in runs], [error(run) for run in runs]
    assert counts == sorted(counts) and counts[0] < 15 and counts[-1] > 20
    assert errors[-1] < 0.5 * errors[0] and errors[0] < 0.05


@pytest.mark.parametrize("controller", [AdaptiveSettings(42), IntervalSettings(Interval(2), Interval(2), 0.01)])
def test_errors_of_differences_count_as_often_as_guidance_multiplies_them(controller: Any) -> None:
    rough = Model(difference_surprise=0.5)
    counts = [Sampling(rough, cfg=cfg).run(all_on(controller)).count(Action.COMPUTE) for cfg in (1.0, 1.2, 8.0)]
    assert counts == sorted(counts) and counts[0] < 20 and counts[-1] == 30
    smooth = [Sampling(cfg=cfg).run(all_on(controller)).count(Action.COMPUTE) for cfg in (1.0, 8.0)]
    assert smooth[1] < 20, "where differences can be predicted, guidance takes little away"


@pytest.mark.parametrize("sampler", CORRECTED)
@pytest.mark.parametrize("target", [36, 42, 50])
def test_the_target_is_reached(target: float, sampler: str) -> None:
    """Of latents here, whose peak is taken to be four times their standard deviation."""
    sampling = Sampling(Model(surprise=lambda s: 0.05), sampler)
    run, full = sampling.run(all_on(AdaptiveSettings(target), "hedged")), sampling.full()
    psnr = 10 * torch.log10((4 * full.std()) ** 2 / (run.latent - full).pow(2).mean())
    assert run.count(Action.PREDICT) > 2 and psnr > target


def test_a_sampler_that_may_not_be_predicted_gets_estimates() -> None:
    run = Sampling(sampler="sample_heun").run(replace(all_on(AdaptiveSettings(42)), output=None))
    assert run.count(Action.ESTIMATE) > 10 and "P" not in run.letters and error(run) < 1e-3


def test_a_plan_is_followed_to_the_letter() -> None:
    letters = "CCCPPECPECPPPCEECPCCCPPCEPECPC"
    run = Sampling().run(all_on(steps(letters)))
    assert run.letters == letters and error(run) < 0.05


def test_what_ends_a_run_is_computed_whatever_the_plan_says() -> None:
    assert Sampling().run(all_on(steps("C" * 3 + "P" * 27))).letters == "CCC" + "P" * 26 + "C"


def test_a_plan_computes_where_too_little_is_known() -> None:
    run = Sampling().run(all_on(steps("CPPPPPCECECPC")))
    assert run.letters[:7] == "CCCPPPC", "three values make a fitted forecast"
    assert Sampling().run(all_on(steps("CPPPCECP"), "hold")).letters[:8] == "CPPPCECP", "one is held"
    assert Sampling().run(all_on(steps("CPPP"), "fitted")).letters[:4] == "CCCP"
    assert Sampling().run(all_on(steps("CPPP", fewest=1), "fitted")).letters[:4] == "CPPP"


def test_keyframes_and_reused_features_alternate() -> None:
    run = Sampling().run(all_on(MixSettings(every=3, mixing="features"), "hold", reuse=True))
    assert run.letters == "CRR" * 9 + "CRC"
    held = Sampling().run(all_on(MixSettings(every=3, mixing="scores"), "hold", reuse=True))
    assert held.letters == "CPP" * 9 + "CPC" and held.rows == 4 * held.count(Action.COMPUTE)


# Mixing


def test_a_mix_lies_between_what_was_reused_and_what_was_predicted() -> None:
    sampling = Sampling(sigmas=grids.even(6))
    runs = {letter: sampling.run(_mixing(letter)) for letter in "MRP"}
    for i in (0, 1):
        mixed, reused, predicted = (runs[letter].outcomes[3].outputs[i] for letter in "MRP")
        torch.testing.assert_close(mixed, 0.25 * reused + 0.75 * predicted)
        assert not torch.allclose(reused, predicted, atol=1e-3)
    assert runs["M"].outcomes[3].actions == {0: Action.MIX, 1: Action.MIX}


def _mixing(letter: str) -> CacheSettings:
    plan = list(zip(grids.even(6), [COMPUTE] * 3 + [replace(LETTERS[letter], mix=0.25)]))
    return all_on(StepsSettings(plan), reuse=True)


def test_where_nothing_can_be_reused_a_mix_is_computed() -> None:
    run = Sampling(sigmas=grids.even(6)).run(replace(_mixing("M"), reuse=None))
    assert run.letters == "CCCCCC" and torch.equal(run.latent, run.sampling.full())


def test_where_too_little_is_known_a_mix_only_reuses() -> None:
    plan = [(sigma, replace(LETTERS["M"], mix=0.25)) for sigma in grids.even(6)]
    run = Sampling(sigmas=grids.even(6)).run(all_on(StepsSettings(plan), reuse=True))
    assert run.letters == "CRRRRC"


def test_reused_outputs_teach_forecasts_nothing() -> None:
    """An output with old features in it is not what the network says."""
    run = Sampling().run(all_on(steps("CRP"), "hold", reuse=True))
    assert run.letters[:3] == "CRP"
    first, reused, held = (_velocity(run, ordinal, 0) for ordinal in range(3))
    torch.testing.assert_close(held, first, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(reused, first, atol=1e-2)


def _velocity(run: Run, ordinal: int, branch: int) -> Tensor:
    """What the model, or what stood in for it, gave for a branch at an evaluation of an Euler run."""
    return (_latent_at(run, ordinal) - run.outcomes[ordinal].outputs[branch]) / run.sampling.sigmas[ordinal]


def _latent_at(run: Run, ordinal: int) -> Tensor:
    """The latent that an evaluation of an Euler run saw."""
    sigmas, x = run.sampling.sigmas, run.sampling.model.noise
    for i in range(ordinal):
        cond, uncond = run.outcomes[i].outputs
        guided = cond + (run.sampling.cfg - 1) * (cond - uncond)
        x = x + (x - guided) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


# Weights of a policy


def test_a_policys_weights_take_the_place_of_the_forecast() -> None:
    weighted = Step(Action.PREDICT, 0.0, 1.0, (2.0, -1.0), (1.0,))
    plan = list(zip(grids.even(6), [COMPUTE, COMPUTE, weighted]))
    run = Sampling(sigmas=grids.even(6)).run(all_on(StepsSettings(plan)))
    assert run.letters[:3] == "CCP", "two weights need two values"
    (c0, _), (c1, u1), (c2, u2) = ([_velocity(run, ordinal, branch) for branch in (0, 1)] for ordinal in range(3))
    torch.testing.assert_close(c2, 2 * c1 - c0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(u2 - c2, u1 - c1, rtol=1e-3, atol=1e-3)


def test_weights_of_an_estimate_act_on_the_differences() -> None:
    weighted = Step(Action.ESTIMATE, 0.5, 1.0, (), (0.0, 0.0, 1.0))
    plan = list(zip(grids.even(6), [COMPUTE, COMPUTE, COMPUTE, weighted]))
    run = Sampling(sigmas=grids.even(6)).run(all_on(StepsSettings(plan)))
    first, estimated = run.outcomes[0].outputs, run.outcomes[3].outputs
    sigmas = run.sampling.sigmas
    torch.testing.assert_close((estimated[1] - estimated[0]) / sigmas[3], (first[1] - first[0]) / sigmas[0])


# Changes of conditionings


@pytest.mark.parametrize(
    "controller, wait",
    [(PREDICTING, 3), (ESTIMATING, 3), (AdaptiveSettings(30), 2), (steps("CCC" + "PC" * 13 + "C"), 3)],
)
def test_after_a_change_everything_is_computed_until_enough_is_known_again(controller: Any, wait: int) -> None:
    run = Sampling(fingerprint=lambda sigma: sigma > 0.45).run(all_on(controller))
    changed = next(i for i, sigma in enumerate(run.sampling.sigmas) if sigma <= 0.45)
    assert {*run.letters[:changed]} > {"C"} and run.letters[changed : changed + wait] == "C" * wait
    assert {*run.letters[changed + wait :]} > {"C"}, "and then it goes on"


def test_nothing_is_carried_over_a_change() -> None:
    """The same run, once with another model before the change, ends the same way from the same latent."""
    sampling = Sampling(fingerprint=lambda sigma: sigma > 0.5, sigmas=grids.even(20))
    run = sampling.run(all_on(PREDICTING))
    assert run.letters[10:13] == "CCC"
    later = replace(sampling, sigmas=grids.even(20)[10:])
    alone = Run(later, all_on(PREDICTING))
    latent = SAMPLERS["sample_euler"](alone.denoise, _latent_at(run, 10), later.sigmas)
    assert alone.letters == run.letters[10:]
    torch.testing.assert_close(latent, run.latent, rtol=1e-3, atol=1e-3)


def test_probes_and_corrections_begin_anew_after_a_change() -> None:
    sampling = Sampling(Model(feature_error=0.1), "sample_heun", fingerprint=lambda sigma: sigma > 0.5)
    run = sampling.run(replace(all_on(AdaptiveSettings(36), reuse=True), output=None))
    changed = next(i for i, outcome in enumerate(run.outcomes) if i and not _same_side(run, i))
    assert any(outcome.probe_rows for outcome in run.outcomes[:changed])
    assert any(outcome.probe_rows for outcome in run.outcomes[changed : changed + 4])


def _same_side(run: Run, ordinal: int) -> bool:
    calls = [run.sampling.sigmas[0], *(s for s in run.sampling.sigmas[1:] for _ in range(2))]
    return (calls[ordinal] > 0.5) == (calls[ordinal - 1] > 0.5)


def test_a_region_that_was_reset_holds_nothing() -> None:
    run = Sampling().run(all_on(AdaptiveSettings(30), "hedged"))
    assert run.engine.tensors()
    run.engine.reset()
    assert run.engine.tensors() == []


# Branches


def test_a_branch_that_is_inactive_is_neither_run_nor_filled_in() -> None:
    def until_half(sigma: float) -> Sequence[int]:
        return (0, 1) if sigma > 0.5 else (0,)

    for controller in (PREDICTING, ESTIMATING, AdaptiveSettings(36)):
        run = Sampling(active=until_half).run(all_on(controller))
        late = [outcome for sigma, outcome in zip(run.sampling.sigmas, run.outcomes) if sigma <= 0.5]
        assert all(set(outcome.actions) == {0} and not outcome.outputs[1].any() for outcome in late)
        assert not any(outcome.action is Action.ESTIMATE for outcome in late), "there is nothing to estimate"
        assert error(run) < 0.01


def test_a_branch_that_becomes_active_is_computed_until_its_difference_is_known() -> None:
    def from_half(sigma: float) -> Sequence[int]:
        return (0,) if sigma > 0.5 else (0, 1)

    run = Sampling(active=from_half).run(all_on(PREDICTING))
    begins = next(i for i, sigma in enumerate(run.sampling.sigmas) if sigma <= 0.5)
    assert "P" in run.letters[:begins] and run.letters[begins : begins + 3] == "CCC" and error(run) < 0.01


def test_without_a_reference_everything_is_computed() -> None:
    for sampling in (Sampling(reference=None), Sampling(active=lambda sigma: (1,))):
        for controller in (PREDICTING, ESTIMATING, AdaptiveSettings(30), steps("CCCPPPP"), MixSettings(2, "features")):
            run = sampling.run(all_on(controller, reuse=True))
            assert {*run.letters} == {"C"} and torch.equal(run.latent, sampling.full())
            assert run.engine.tensors() == [], "and nothing is kept"
            assert {use for use, _ in run.network.calls} == {FeatureUse.STORE}


def test_where_the_reference_goes_away_for_a_while_evaluations_are_computed() -> None:
    run = Sampling(active=lambda sigma: (1,) if 0.4 < sigma < 0.6 else (0, 1)).run(all_on(PREDICTING))
    away = [letter for letter, sigma in zip(run.letters, run.sampling.sigmas) if 0.4 < sigma < 0.6]
    assert {*away} == {"C"} and "P" in run.letters and error(run) < 0.05


def test_without_a_negative_there_is_nothing_to_estimate_and_outputs_are_predicted() -> None:
    alone = Sampling(active=lambda sigma: (0,))
    assert {*alone.run(all_on(ESTIMATING)).letters} == {"C"}
    for controller in (PREDICTING, AdaptiveSettings(36), steps("CCC" + "PC" * 10)):
        run = alone.run(all_on(controller))
        assert run.count(Action.PREDICT) > 5 and run.rows == 2 * run.count(Action.COMPUTE) and error(run) < 1e-3


def test_several_negatives_have_a_difference_each() -> None:
    sampling = Sampling(active=lambda sigma: (0, 1, 2))
    for controller in (PREDICTING, ESTIMATING):
        run = sampling.run(all_on(controller))
        assert {*run.letters} > {"C"} and error(run) < 1e-3
    assert {branches for _, branches in run.network.calls} == {(0,), (0, 1, 2)}
    estimated = next(outcome for outcome in run.outcomes if outcome.action is Action.ESTIMATE)
    assert not torch.allclose(estimated.outputs[1], estimated.outputs[2], atol=1e-2)


# Probes


def probing(feature_error: float, target: float = 42.0, deep: bool = True, **model: Any) -> Run:
    """An adaptive run with features, and a sampler whose steps may not be predicted."""
    sampling = Sampling(Model(feature_error=feature_error, **model), "sample_heun", grids.even(20), deep=deep)
    return sampling.run(replace(all_on(AdaptiveSettings(target), reuse=True), output=None))


@pytest.mark.parametrize("feature_error", [0.0, 0.05, 1.0, 20.0])
def test_rows_of_probes_are_counted(feature_error: float) -> None:
    run = probing(feature_error)
    own = {Action.COMPUTE: 4, Action.REUSE: 4, Action.ESTIMATE: 2}
    probed = sum(outcome.probe_rows for outcome in run.outcomes)
    assert probed > 0 and run.rows == sum(own[outcome.action] for outcome in run.outcomes) + probed
    assert {outcome.probe_rows for outcome in run.outcomes} == {0, 4}, "a probe runs both branches of both pictures"
    assert sum(use is FeatureUse.PROBE for use, _ in run.network.calls) * 4 == probed


def test_probes_never_change_a_result() -> None:
    run = probing(20.0, target=300.0)
    assert any(outcome.probe_rows for outcome in run.outcomes) and {*run.letters} == {"C"}
    assert torch.equal(run.latent, run.sampling.full())


def test_probes_are_seldom_and_never_at_the_first_and_the_last_evaluation() -> None:
    run = probing(0.05)
    at = [i for i, outcome in enumerate(run.outcomes) if outcome.probe_rows]
    assert 1 <= len(at) <= 4 and 0 not in at and len(run.outcomes) - 1 not in at


@dataclass(frozen=True)
class Probing(Corrected):
    """A plan with probes; errors: those known at each evaluation."""

    errors: list[float | None] = field(default_factory=list)
    probes = True

    def controller(self, context: RunContext) -> Controller:
        controller = Corrected(self.letters).controller(context)
        choose = controller.choose

        def watched(evaluation: Evaluation, signals: Signals) -> Step:
            assert signals.probe is not None
            self.errors.append(None if signals.probe.error is None else signals.probe.error.max().item())
            return choose(evaluation, signals)

        controller.choose = watched
        return controller


def test_errors_of_probes_are_those_of_one_evaluation_of_age() -> None:
    """The same features that move evenly: probed one evaluation old, and three."""

    class Even(Model):
        def deep(self, branch: int, sigma: float, x: Tensor) -> Tensor:
            return 0.1 * sigma * self.start

    settings = Probing("CC" + "RRC" * 8, [])
    Sampling(Even((0,))).run(all_on(settings, reuse=True))
    errors = [error for error in dict.fromkeys(settings.errors) if error is not None]
    assert settings.errors[:2] == [None, None] and len(errors) == 3
    assert max(errors) < 1.5 * min(errors), "three times as large if the age did not count"


def test_good_features_are_reused_and_bad_ones_are_not() -> None:
    good, bad = probing(0.02), probing(20.0)
    assert good.count(Action.REUSE) > 15 and error(good) < 0.01
    assert bad.count(Action.REUSE) == 0 and error(bad) < 0.01


def test_features_that_save_little_give_way_to_estimates() -> None:
    deep, shallow = probing(0.02), probing(0.02, deep=False)
    assert deep.count(Action.REUSE) > 10 and deep.count(Action.ESTIMATE) <= 1
    assert shallow.count(Action.ESTIMATE) > 10 and shallow.count(Action.REUSE) <= 1


def test_without_a_reference_nothing_is_probed() -> None:
    """There is nothing that an error would be relative to."""
    sampling = Sampling(Model(feature_error=0.05), "sample_heun", active=lambda sigma: (0, 1) if sigma > 0.99 else (1,))
    run = sampling.run(all_on(AdaptiveSettings(42), reuse=True))
    assert run.letters == "C" * len(run.outcomes)
    assert FeatureUse.PROBE not in {use for use, _ in run.network.calls}


def test_no_probe_is_run_where_features_are_not_reused() -> None:
    for settings in (all_on(AdaptiveSettings(42)), all_on(PREDICTING, reuse=True), all_on(steps("CCCPR"), reuse=True)):
        run = Sampling(sampler="sample_heun").run(settings)
        assert not any(outcome.probe_rows for outcome in run.outcomes)
        assert FeatureUse.PROBE not in {use for use, _ in run.network.calls}


# Corrections


@pytest.mark.parametrize("letters", ["CCC" + "PC" * 13 + "C", "CCC" + "PPC" * 9, "CCC" + "PPPC" * 6 + "CCC"])
@pytest.mark.parametrize("sampler", CORRECTED)
def test_correction_brings_the_final_latent_closer(sampler: str, letters: str) -> None:
    sampling = Sampling(Model(dtype=torch.float64), sampler)
    corrected, plain = (sampling.run(all_on(controller)) for controller in (Corrected(letters), steps(letters)))
    assert corrected.letters == plain.letters and corrected.rows == plain.rows
    assert error(corrected) < 0.5 * error(plain)


def test_a_solver_whose_steps_are_not_known_is_not_corrected() -> None:
    letters = "CCC" + "PC" * 13 + "C"
    sampling = Sampling(solver=Solver())
    corrected, plain = (sampling.run(all_on(controller)) for controller in (Corrected(letters), steps(letters)))
    assert torch.equal(corrected.latent, plain.latent)


def test_where_everything_is_computed_nothing_is_corrected() -> None:
    run = Sampling().run(all_on(Corrected("C" * 30)))
    assert torch.equal(run.latent, run.sampling.full())


# Batches and dtypes


@pytest.mark.parametrize("forecast", FORECASTERS)
@pytest.mark.parametrize("sampler", CORRECTED)
def test_no_picture_depends_on_its_neighbours(sampler: str, forecast: str) -> None:
    letters = "CCC" + "PPC" * 5 + "EPC" * 4

    def latent(*pictures: int) -> Tensor:
        model = Model(pictures, dtype=torch.float64, surprise=lambda sigma: 0.1)
        return Sampling(model, sampler).run(all_on(Corrected(letters), forecast)).latent

    together = latent(3, 4, 5)
    for i, picture in enumerate((3, 4, 5)):
        torch.testing.assert_close(together[i : i + 1], latent(picture))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "controller", [PREDICTING, ESTIMATING, AdaptiveSettings(42), Corrected("CCC" + "PC" * 13 + "C")]
)
def test_latents_in_small_dtypes_are_sampled_as_in_float32(controller: Any, dtype: torch.dtype) -> None:
    forecast = "fitted" if controller is ESTIMATING else "hedged"
    small, whole = (Sampling(Model(dtype=d)).run(all_on(controller, forecast)) for d in (dtype, torch.float32))
    assert small.latent.dtype == dtype and small.latent.isfinite().all()
    full = small.sampling.full().float()
    rounding = (full - whole.sampling.full()).norm()
    assert (small.latent.float() - whole.latent).norm() < 5 * rounding


# Unusual sigmas


UNUSUAL = {
    "one step": [1.0, 0.0],
    "two steps": [1.0, 0.5, 0.0],
    "repeated": [1.0, 0.9, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4, 0.4, 0.3, 0.2, 0.2, 0.1, 0.0],
    "all the same": [0.5] * 9,
    "a zero in the middle": [*grids.even(10), 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
    "rising": [0.1 * i for i in range(1, 11)],
    "there and back": [0.9, 0.8, 0.7, 0.6, 0.7, 0.8, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
    "part of the way": [0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3],
    "linear_quadratic": grids.linear_quadratic(50),
    "beta, shift 12": grids.beta(40, 12.0),
    "simple, shift 12": grids.simple(50, 12.0),
}
CONTROLLERS = {
    "predict": all_on(IntervalSettings(Interval(3))),
    "predict, hedged": all_on(IntervalSettings(Interval(4)), "hedged"),
    "estimate": all_on(IntervalSettings(estimate=Interval(3)), "blend"),
    "tolerance": all_on(IntervalSettings(Interval(3), Interval(5), tolerance=1.0)),
    "adaptive": all_on(AdaptiveSettings(30), "hedged", reuse=True),
    "mixing": all_on(MixSettings(3, "paper"), reuse=True),
    "released weights": CacheSettings("", ESTIMATING, DifferenceSettings("linear", "released")),
}


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("grid", UNUSUAL)
def test_unusual_sigmas_never_crash_and_end_in_finite_latents(grid: str, controller: str) -> None:
    for sampler in SAMPLERS:
        sampling = Sampling(Model((0,), shape=(2, 4, 4)), sampler, UNUSUAL[grid])
        run, full = sampling.run(CONTROLLERS[controller]), sampling.full()
        assert run.latent.isfinite().all() and run.latent.norm() < 20 * full.norm(), sampler


@pytest.mark.parametrize("sampler", CORRECTED)
def test_a_plan_is_corrected_at_unusual_sigmas_without_a_crash(sampler: str) -> None:
    for sigmas in UNUSUAL.values():
        letters = ("CCC" + "PPC" * len(sigmas))[: len(sigmas) - 1]
        sampling = Sampling(sampler=sampler, sigmas=sigmas)
        run = sampling.run(all_on(Corrected(letters), "hedged"))
        assert run.latent.isfinite().all() and run.latent.norm() < 20 * sampling.full().norm()


@pytest.mark.parametrize("grid", ["linear_quadratic", "beta, shift 12", "simple, shift 12"])
@pytest.mark.parametrize("sampler", CORRECTED)
def test_dense_grids_are_sampled_as_closely_as_even_ones(sampler: str, grid: str) -> None:
    sampling = Sampling(sampler=sampler, sigmas=UNUSUAL[grid])
    run = sampling.run(all_on(AdaptiveSettings(42), "hedged"))
    assert run.count(Action.PREDICT) > len(run.outcomes) / 3 and error(run) < 0.01


# Beside a compiled model, and observers


def test_where_the_host_must_not_wait_decisions_come_a_gap_later() -> None:
    now, late = (Sampling(late=late).run(all_on(AdaptiveSettings(42), "hedged")) for late in (False, True))
    assert now.letters.index("P") < late.letters.index("P") <= now.letters.index("P") + 2
    assert 0 < late.count(Action.COMPUTE) - now.count(Action.COMPUTE) <= 4 and error(late) < 1e-3


class Watcher:
    """Sees every evaluation, and predicts by weights of its own."""

    def __init__(self, cond: tuple[float, ...] = ()) -> None:
        self.cond, self.seen, self.weighed = cond, [], []

    def before(self, pass_: Pass, network: Network) -> Network:
        self.seen.append(pass_.evaluation.ordinal)
        return _Counted(network, self)

    def weigh(self, step: Step, pass_: Pass, signals: Signals, outputs: Sequence[Tensor]) -> Step:
        self.weighed.append((step.action, signals.output is not None, len(signals.differences), len(outputs)))
        return replace(step, cond=self.cond, difference=(1.0,))

    def after(self, pass_: Pass, action: Action, outputs: Sequence[Tensor]) -> None:
        self.seen.append(action)


@dataclass
class _Counted:
    network: Network
    watcher: Watcher

    def run(self, pass_: Pass, branches: Sequence[Any], features: FeatureUse) -> Result:
        self.watcher.seen.append("ran")
        return self.network.run(pass_, branches, features)


def test_an_observer_sees_every_evaluation_and_hands_over_the_network() -> None:
    watcher = Watcher()
    Sampling(sigmas=grids.even(6), observer=watcher).run(all_on(steps("CCCPEC", grids.even(6))))
    assert watcher.seen == [
        *(0, "ran", Action.COMPUTE),
        *(1, "ran", Action.COMPUTE),
        *(2, "ran", Action.COMPUTE),
        *(3, Action.PREDICT),
        *(4, "ran", Action.ESTIMATE),
        *(5, "ran", Action.COMPUTE),
    ]
    skipped = [weighed for weighed in watcher.weighed if weighed[0] is not Action.COMPUTE]
    assert skipped == [(Action.PREDICT, True, 1, 0), (Action.ESTIMATE, True, 1, 2)]


def test_an_observers_weights_are_predicted_with() -> None:
    """Hold is the weight of the newest value alone."""
    letters = "CCC" + "PC" * 13 + "C"
    held = Sampling().run(all_on(steps(letters), "hold"))
    weighed = Sampling(observer=Watcher((1.0,))).run(all_on(steps(letters), "fitted"))
    torch.testing.assert_close(weighed.latent, held.latent)


def test_a_computed_step_that_brings_weights_hands_over_what_they_correct() -> None:
    """Weights of the newest value alone, and then the same with half as much of the one before."""
    sigmas, outputs = grids.even(6), []
    for weights in ((), (1.0,), (1.0, 0.5)):
        planned = [COMPUTE, COMPUTE, replace(COMPUTE, cond=weights)]
        plan = StepsSettings(list(zip(sigmas, planned, strict=False)), fewest=1)
        run = Sampling(sigmas=sigmas, active=lambda sigma: [0]).run(all_on(plan, "linear"))
        assert run.letters == "CCCCCC"
        outputs.append(run.outcomes[2].outputs[0])
    torch.testing.assert_close(outputs[1], outputs[0])
    assert (outputs[2] - outputs[0]).abs().max() > 0.01


def test_it_works_without_forecasts_of_outputs_or_of_differences() -> None:
    for settings in (replace(all_on(AdaptiveSettings(42)), output=None), replace(all_on(ESTIMATING), output=None)):
        run = Sampling().run(settings)
        assert "P" not in run.letters and run.count(Action.ESTIMATE) > 5 and error(run) < 0.01
    alone = CacheSettings("outputs", AdaptiveSettings(42), output=OutputSettings())
    run = Sampling(active=lambda sigma: (0,)).run(alone)
    assert run.count(Action.PREDICT) > 10 and error(run) < 0.01


@pytest.mark.parametrize("controller", [PREDICTING, AdaptiveSettings(36), MixSettings(2, "scores")])
def test_where_other_branches_could_not_follow_no_output_is_predicted(controller: Any) -> None:
    """Without forecasts of differences a predicted step has no negative."""
    alone = CacheSettings("outputs alone", controller, None, OutputSettings())
    run = Sampling().run(alone)
    assert run.letters == "C" * 30 and torch.equal(run.latent, run.sampling.full())
    assert Sampling(active=lambda sigma: (0,)).run(alone).count(Action.PREDICT) > 5


class QuietTrack(Model):
    """A loud latent that is easy to predict, packed with a small and quiet one that is not."""

    LOUD, QUIET = 3840, 256

    def __init__(self) -> None:
        super().__init__(shape=(1, self.LOUD + self.QUIET))
        self.gain = torch.ones(self.shape)
        self.gain[..., self.LOUD :] = 0.01
        self.noise = self.noise * self.gain

    def shallow(self, branch: int, sigma: float, x: Tensor) -> Tensor:
        rough = 0.2 * self.fields(1, 1 + round(1e4 * sigma))[0] * (self.gain < 1)
        return (super().shallow(branch, sigma, x / self.gain) + rough) * self.gain

    def deep(self, branch: int, sigma: float, x: Tensor) -> Tensor:
        return super().deep(branch, sigma, x) * self.gain


@pytest.mark.parametrize("controller", [AdaptiveSettings(40.0), IntervalSettings(Interval(3), tolerance=0.004)])
def test_a_quiet_sound_track_is_not_sacrificed_to_a_picture(controller: Any) -> None:
    """The error of each part of a packed latent counts by itself: the whole is as near as the part that is worst."""

    def parts(run: Run) -> list[float]:
        full = run.sampling.full()
        pairs = zip(*(latent.split([QuietTrack.LOUD, QuietTrack.QUIET], -1) for latent in (run.latent, full)))
        return [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]

    packed = Sampling(QuietTrack(), parts=(QuietTrack.LOUD, QuietTrack.QUIET)).run(all_on(controller))
    as_one = Sampling(QuietTrack()).run(all_on(controller))
    picture, sound = parts(packed)
    assert parts(as_one)[1] > 0.03, "taken as one, its error does not show"
    assert sound < 0.02 and picture < 0.02 and packed.rows > as_one.rows
