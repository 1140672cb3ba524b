"""What is laid down beforehand: FRDiff's keyframes and score mixing, or the steps of a policy.

Score mixing (FRDiff, arXiv 2312.03517), as in its released code: with r the part of sampling that is done,

    lambda = clip((tau * (r - b) + 2) / 4, 0, 1),     score = lambda * reused + (1 - lambda) * held

so early evaluations run no network at all (lambda 0) and late ones only reuse features (lambda 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..actions import COMPUTE, Action, Step
from ..calibration.policy import Policy
from ..clock import Evaluation, Window
from ..protocols import Controller, ControllerSettings, Pass, RunContext, Signals
from ..signal import Signal
from ..solvers import Solver

# Below this lambda the released code runs no network.
NO_CALL = 1e-10
# How near an evaluation's sigma must be to the one that its step was laid down for, in log sigma.
NEAR = 1e-2

CONSTANT = {"measured": 0.0, "scores": 0.0, "features": 1.0}
MIXINGS = ("paper", *CONSTANT)


@dataclass(frozen=True)
class MixSettings:
    """every: one keyframe in so many evaluations (M); mixing: "paper" = lambda as above, "scores" and "measured" = 0
    and "features" = 1 throughout; tau, bias: slope and middle of lambda; window: the part of sampling outside which
    every evaluation is a keyframe; as_released: the last evaluation is one like any other."""

    every: int = 2
    mixing: str = "paper"
    tau: float = 30.0
    bias: float = 0.5
    window: Window = field(default_factory=Window)
    as_released: bool = False
    corrects, probes, longest_reuse = False, False, None
    reference_only, holds_slope, uses_errors, weighs = False, True, False, False

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, str | None]:
        """See ControllerSettings."""
        return self, None

    def controller(self, context: RunContext) -> Controller:
        """The controller of one region of a run."""
        return PlannedController(MixPlan(self, context), spares_last=not self.as_released)


@dataclass(frozen=True)
class PolicySettings:
    """policy: moved to the evaluations of a run before that begins, which makes StepsSettings of it."""

    policy: Policy
    corrects, probes, longest_reuse = False, False, None
    reference_only, holds_slope, uses_errors, weighs = False, False, False, True

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, str | None]:
        """See ControllerSettings."""
        return self, None

    def controller(self, context: RunContext) -> Controller:
        """The controller of one region of a run at the policy's own sigmas."""
        return StepsSettings(list(zip(self.policy.sigmas, self.policy.steps, strict=True))).controller(context)


@dataclass(frozen=True)
class StepsSettings:
    """steps: (sigma, Step) of every evaluation; fewest: values that a step without weights needs, None for as many as
    its forecaster uses."""

    steps: Sequence[tuple[float, Step]]
    fewest: int | None = None
    corrects, probes, longest_reuse = False, False, None
    reference_only, holds_slope, uses_errors, weighs = False, False, False, True

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, str | None]:
        """See ControllerSettings."""
        return self, None

    def controller(self, context: RunContext) -> Controller:
        """The controller of one region of a run."""
        return PlannedController(StepsPlan(self.steps), self.fewest)


class PlannedController:
    """Follows a plan, and computes where a step cannot be taken, since too few values are known yet."""

    def __init__(self, plan: MixPlan | StepsPlan, fewest: int | None = None, spares_last: bool = True) -> None:
        """spares_last: the last evaluation is computed, but for steps with weights."""
        self.plan, self.fewest, self.spares_last = plan, fewest, spares_last

    def choose(self, evaluation: Evaluation, signals: Signals) -> Step:
        """See Controller."""
        step = self.plan.at(evaluation)
        if evaluation.is_last and self.spares_last and not (step.weighs or self.fewest):
            return COMPUTE
        known = all(self._known(signal, step.difference) for signal in signals.differences)
        if step.action is Action.ESTIMATE:
            return step if known and signals.differences else COMPUTE
        if step.action is Action.COMPUTE and step.weighs:
            known = all(self._known(signal, step.difference, 1) for signal in signals.differences)
            return step if known and self._known(signals.output, step.cond, 1) else COMPUTE
        if step.action in (Action.PREDICT, Action.MIX) and not (known and self._known(signals.output, step.cond)):
            return COMPUTE if step.action is Action.PREDICT else Step(Action.REUSE)
        return step

    def unit(self, pass_: Pass, cond: Tensor) -> Tensor | None:
        """See Controller: nothing here depends on errors."""
        return None

    def took(self, evaluation: Evaluation, action: Action) -> None:
        """See Controller: a plan does not depend on what was done."""

    def reset(self) -> None:
        """See Controller: a plan has no past."""

    def finish(self, signals: Signals) -> float | None:
        """See Controller: a plan does not depend on errors."""
        return None

    def _known(self, signal: Signal | None, weights: Sequence[float], more: int = 0) -> bool:
        """True when `signal`, with so many values `more`, has enough of them."""
        if signal is None:
            return False
        weighed = len(weights) // signal.forecaster.per_value
        return signal.known + more >= (weighed or self.fewest or signal.forecaster.depth)


class StepsPlan:
    """A step for every evaluation, where the run is where it was expected."""

    def __init__(self, steps: Sequence[tuple[float, Step]]) -> None:
        self.steps = steps

    def at(self, evaluation: Evaluation) -> Step:
        """The step of an evaluation; COMPUTE where its sigma is another one."""
        if evaluation.ordinal >= len(self.steps):
            return COMPUTE
        sigma, step = self.steps[evaluation.ordinal]
        return step if min(evaluation.sigma, sigma) > 0 and abs(math.log(evaluation.sigma / sigma)) < NEAR else COMPUTE


class MixPlan:
    """FRDiff: keyframes, and between them the last score, reused features or a mix of both.

    Samplers with several calls a step have their keyframe at the last one: errors of the first only move the point that
    is probed. Where scores may not be held, features are reused.
    """

    def __init__(self, settings: MixSettings, context: RunContext) -> None:
        self.settings, self.context = settings, context
        self.high, self.low = settings.window.sigmas(context.percent_to_sigma)

    def at(self, evaluation: Evaluation) -> Step:
        """The step of an evaluation."""
        if self.is_keyframe(evaluation):
            return COMPUTE
        share = self.share(evaluation) if self.context.predicts else 1.0
        return Step({0.0: Action.PREDICT, 1.0: Action.REUSE}.get(share, Action.MIX), mix=share)

    def is_keyframe(self, evaluation: Evaluation) -> bool:
        """True for ordinals 0, M, 2M ... (earlier by the calls of a step beyond one) and outside the window."""
        phase = self.context.solver.calls - 1
        inside = self.low <= evaluation.sigma <= self.high
        return not inside or evaluation.ordinal == 0 or (evaluation.ordinal + phase) % self.settings.every == 0

    def share(self, evaluation: Evaluation) -> float:
        """Lambda at `evaluation`: 0.0 = PREDICT, no network call; 1.0 = REUSE; between = MIX.

        r is the number of the step over that of all steps, as in the released code.
        """
        s, steps = self.settings, max(len(self.context.sigmas) - 1, 1)
        if s.mixing in CONSTANT:
            return CONSTANT[s.mixing]
        share = mix_share(evaluation.progress * (steps - 1) / steps, s.tau, s.bias)
        return 0.0 if share < NO_CALL else share


def mix_share(r: float, tau: float = 30.0, bias: float = 0.5) -> float:
    """Lambda at the part `r` (0 to 1) of sampling that is done."""
    return min(max((tau * (r - bias) + 2.0) / 4.0, 0.0), 1.0)
