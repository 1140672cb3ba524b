"""Plans: score mixing follows the released FRDiff code, on its own grid and on others; steps of a policy."""

from collections.abc import Sequence

import pytest
import torch

from fastercache_core.actions import COMPUTE, Action, Step
from fastercache_core.calibration.policy import Point, Policy, Setup
from fastercache_core.clock import Clock, Window
from fastercache_core.controllers.planned import (
    MixPlan,
    MixSettings,
    PolicySettings,
    StepsSettings,
    mix_share,
)
from fastercache_core.protocols import RunContext, Signals
from fastercache_core.signal import OutputSettings, Signal
from fastercache_core.solvers import SOLVERS, Solver
from support import grids

STEPS = 50
DDIM = [1000.0 * (1 - i / STEPS) for i in range(STEPS)]  # evenly spaced timesteps, used as sigmas


def context(solver: Solver = Solver(), sigmas: Sequence[float] = (*DDIM, 0.0)) -> RunContext:
    return RunContext(lambda percent: 1000.0 * (1 - percent), solver, tuple(sigmas))


def walk(
    settings: MixSettings = MixSettings(), sigmas: Sequence[float] = DDIM, run: RunContext = context()
) -> list[float | None]:
    """Per evaluation: None for a keyframe, else lambda."""
    plan, clock = MixPlan(settings, run), Clock([*sigmas, 0.0])
    return [None if plan.is_keyframe(e) else plan.share(e) for e in map(clock.tick, sigmas)]


def letters(settings: MixSettings, run: RunContext = context()) -> str:
    plan, clock = MixPlan(settings, run), Clock([*DDIM, 0.0])
    return "".join(plan.at(clock.tick(sigma)).action.letter for sigma in DDIM)


# Score mixing


def test_fifty_steps_of_ddim_take_25_keyframes_11_held_scores_and_14_evaluations_with_reuse() -> None:
    shares = walk()
    assert shares.count(None) == 25 and shares.count(0.0) == 11
    assert [shares[i] for i in (21, 23, 25, 27, 29, 49)] == pytest.approx([0.0, 0.2, 0.5, 0.8, 1.0, 1.0])


def test_lambda_0_is_predicted_1_reused_and_what_lies_between_mixed() -> None:
    assert letters(MixSettings()) == "CP" * 11 + "CM" * 3 + "CR" * 11
    assert MixPlan(MixSettings(), context()).at(Clock(DDIM).tick(DDIM[0])) == COMPUTE
    plan, clock = MixPlan(MixSettings(), context()), Clock([*DDIM, 0.0])
    steps = [plan.at(clock.tick(sigma)) for sigma in DDIM]
    assert steps[23].mix == pytest.approx(0.2)


def test_lambda_is_zero_early_one_late_and_a_half_at_the_bias() -> None:
    assert mix_share(0.43) == 0.0 and mix_share(0.57) == 1.0 and mix_share(0.5) == 0.5
    assert mix_share(0.7, bias=0.7) == 0.5
    assert mix_share(0.55, tau=1000) == 1.0, "a steep slope is a switch"


@pytest.mark.parametrize("mixing, letter", [("scores", "P"), ("measured", "P"), ("features", "R")])
def test_other_mixings_do_one_thing_throughout(mixing: str, letter: str) -> None:
    assert letters(MixSettings(mixing=mixing)) == f"C{letter}" * 25


def test_where_scores_may_not_be_held_features_are_reused() -> None:
    run = RunContext(**{**vars(context()), "predicts": False})
    assert letters(MixSettings(), run) == letters(MixSettings(mixing="scores"), run) == "CR" * 25


@pytest.mark.parametrize("sigmas", [[t - 1000.0 / STEPS for t in DDIM], grids.simple(STEPS, 8.0)[:-1]])
def test_lambda_follows_the_number_of_the_step_whatever_the_sigmas(sigmas: Sequence[float]) -> None:
    assert walk(sigmas=sigmas, run=context(sigmas=[*sigmas, 0.0])) == pytest.approx(walk())


@pytest.mark.parametrize("as_released, action", [(False, Action.COMPUTE), (True, Action.REUSE)])
def test_the_last_step_is_computed_or_like_any_other_as_in_the_released_code(as_released: bool, action: Action) -> None:
    controller = MixSettings(as_released=as_released).controller(context())
    clock = Clock([*DDIM, 0.0])
    chosen = [controller.choose(clock.tick(sigma), Signals(known(3, "hold"), [])).action for sigma in DDIM]
    assert chosen[-1] is action and chosen[-3] is Action.REUSE


def test_every_mth_evaluation_is_a_keyframe_whatever_the_sigmas() -> None:
    heun = [s for s in DDIM[:10] for _ in range(2)]
    keyframes = [i for i, share in enumerate(walk(MixSettings(every=3), heun)) if share is None]
    assert keyframes == [0, 3, 6, 9, 12, 15, 18]


def test_of_two_calls_a_step_the_second_is_the_keyframe() -> None:
    heun = [DDIM[0], *(s for s in DDIM[1:10] for _ in range(2))]
    shares = walk(MixSettings(every=2), heun, context(SOLVERS["sample_heun"]))
    assert [i for i, share in enumerate(shares) if share is None] == [0, *range(1, 19, 2)]


def test_outside_its_window_everything_is_computed() -> None:
    shares = walk(MixSettings(window=Window(0.2, 0.6)))
    assert set(shares[:10]) == {None} and set(shares[31:]) == {None} and 0.0 in shares[10:31]


# Steps


PREDICT, ESTIMATE, REUSE = Step(Action.PREDICT), Step(Action.ESTIMATE, 0.5), Step(Action.REUSE, 0.5)
SIGMAS = grids.even(6)


def known(count: int, forecast: str = "fitted") -> Signal:
    """A signal with so many values."""
    signal = OutputSettings(forecast).signal()
    for i in range(count):
        signal.observe(1 - 0.1 * i, torch.ones(1, 1, 4, 4))
    return signal


def chosen(
    step: Step, output: Signal | None, differences: Sequence[Signal | None], fewest: int | None = None
) -> Action:
    """What is done where `step` was planned for the first of two evaluations."""
    controller = StepsSettings([(1.0, step), (0.5, COMPUTE)], fewest).controller(context())
    return controller.choose(Clock([1.0, 0.5, 0.0]).tick(1.0), Signals(output, differences)).action


@pytest.mark.parametrize("action", [Action.PREDICT, Action.MIX])
def test_a_prediction_needs_the_values_of_every_signal(action: Action) -> None:
    instead = Action.COMPUTE if action is Action.PREDICT else Action.REUSE
    step = Step(action)
    assert chosen(step, known(3), [known(3)]) is chosen(step, known(3), []) is action
    assert chosen(step, known(2), [known(3)]) is chosen(step, known(3), [known(2)]) is instead
    assert chosen(step, known(3), [None]) is chosen(step, None, [known(3)]) is instead


def test_weights_need_as_many_values_as_they_are() -> None:
    step = Step(Action.PREDICT, 0.0, 1.0, (1.5, -0.5), (1.0,))
    assert chosen(step, known(2), [known(1)]) is Action.PREDICT
    assert chosen(step, known(1), [known(1)]) is Action.COMPUTE
    assert chosen(step, known(2), [known(0)]) is Action.COMPUTE


def test_how_few_values_are_enough_can_be_said() -> None:
    assert chosen(PREDICT, known(1), [known(1)], fewest=1) is Action.PREDICT
    assert chosen(PREDICT, known(1), [known(0)], fewest=1) is Action.COMPUTE


def test_an_estimate_needs_differences_and_no_output() -> None:
    assert chosen(ESTIMATE, None, [known(3)]) is Action.ESTIMATE
    assert chosen(ESTIMATE, known(3), []) is chosen(ESTIMATE, known(3), [known(2)]) is Action.COMPUTE


def test_features_are_reused_whatever_is_known() -> None:
    assert chosen(REUSE, None, [None]) is Action.REUSE


def test_the_last_evaluation_is_computed() -> None:
    controller = StepsSettings([(1.0, COMPUTE), (0.5, PREDICT)]).controller(context())
    clock = Clock([1.0, 0.5, 0.0])
    assert [controller.choose(clock.tick(s), Signals(known(3), [])).action for s in (1.0, 0.5)] == [Action.COMPUTE] * 2


def test_the_last_evaluation_is_skipped_where_a_policy_has_weights_for_it() -> None:
    step = Step(Action.PREDICT, 0.0, 1.0, (1.5, -0.5))
    controller, clock = StepsSettings([(1.0, COMPUTE), (0.5, step)]).controller(context()), Clock([1.0, 0.5, 0.0])
    actions = [controller.choose(clock.tick(s), Signals(known(2), [])).action for s in (1.0, 0.5)]
    assert actions == [Action.COMPUTE, Action.PREDICT]


def test_a_correction_counts_the_value_that_is_being_computed() -> None:
    step = Step(Action.COMPUTE, 1.0, 1.0, (1.0, 0.1, -0.1))
    controller = StepsSettings([(1.0, step), (0.5, COMPUTE)]).controller(context())
    clock = Clock([1.0, 0.5, 0.0])
    evaluation = clock.tick(1.0)
    assert controller.choose(evaluation, Signals(known(2), [])) == step
    assert (
        controller.choose(evaluation, Signals(known(1), []))
        == controller.choose(evaluation, Signals(None, []))
        == COMPUTE
    )


@pytest.mark.parametrize("off, action", [(1e-3, Action.PREDICT), (-1e-3, Action.PREDICT), (0.05, Action.COMPUTE)])
def test_a_step_is_taken_at_the_sigma_that_it_was_laid_down_for(off: float, action: Action) -> None:
    controller = StepsSettings([(sigma, PREDICT) for sigma in SIGMAS[:-1]]).controller(context())
    clock = Clock(SIGMAS)
    for sigma in SIGMAS[:-2]:
        assert controller.choose(clock.tick(sigma * (1 - off)), Signals(known(3), [])).action is action


def test_what_is_beyond_the_plan_is_computed() -> None:
    controller, clock = StepsSettings([(1.0, REUSE)]).controller(context()), Clock(SIGMAS)
    actions = [controller.choose(clock.tick(sigma), Signals(known(3), [])).action for sigma in SIGMAS[:-1]]
    assert actions == [Action.REUSE] + [Action.COMPUTE] * 5
    assert StepsSettings(()).controller(context()).choose(Clock(SIGMAS).tick(1.0), Signals(None, [])) == COMPUTE


def test_a_plan_at_a_sigma_of_zero_does_not_fail() -> None:
    controller = StepsSettings([(0.0, REUSE), (0.5, REUSE)]).controller(context())
    clock = Clock([0.8, 0.0, 0.5, 0.2, 0.0])
    assert [controller.choose(clock.tick(s), Signals(None, [])) for s in (0.8, 0.0)] == [COMPUTE, COMPUTE]


def test_a_policy_is_followed_at_its_own_sigmas() -> None:
    policy = Policy(Setup("any", "euler", "simple", 3, 3.0), (1.0, 0.5, 0.2), (Point(0.1, (COMPUTE, REUSE, COMPUTE)),))
    controller, clock = PolicySettings(policy).controller(context()), Clock([1.0, 0.5, 0.2, 0.0])
    steps = [controller.choose(clock.tick(sigma), Signals(None, [])) for sigma in policy.sigmas]
    assert steps == [COMPUTE, REUSE, COMPUTE]
