"""The adaptive controller: how often to compute, from how far the picture may be from full sampling.

Like the step size control of an ODE solver. Every computed evaluation shows, for free, the error of the forecast that
it made unnecessary. On three models and over 50 dB, the error of a picture was found to follow from these alone: error
of the slope times the span in sigma of the gap, relative to the latent, squares added up over the gaps. So the target
PSNR is an error budget that a run may spend. Carried ahead, an error grows with the gap; the longest gap is taken that
leaves as much for every gap after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import messages
from ..actions import COMPUTE, Action, Step
from ..clock import Evaluation, Window
from ..features.probe import Probe
from ..forecast import REACH_LATENT
from ..protocols import Controller, ControllerSettings, Pass, RunContext, Signals
from ..readback import Readback
from ..signal import Signal
from ..solvers import Solver

# Below these targets in dB fewer steps can be better: forecasts then feed on their own errors. Where a sampler adds
# noise, fewer steps give another picture.
FLOOR, FLOOR_NOISY, FLOOR_UNCORRECTED = 30.0, 36.0, 42.0
LONGEST_REUSE = 3  # the longest gap in which features are reused
LONGEST_UNCORRECTED = 2  # the longest gap of predictions that are not corrected
GROWTH = 3.0  # an error so many times the expected one counts as no larger: it may be a single bad forecast


@dataclass(frozen=True)
class AdaptiveSettings:
    """target: PSNR to full sampling in dB; window: the part of sampling in which to skip; longest: the longest gap from
    one computed evaluation to the next."""

    target: float = 42.0
    window: Window = Window()
    longest: int = 4
    corrects, probes, longest_reuse = True, True, LONGEST_REUSE
    reference_only, holds_slope, uses_errors, weighs = False, False, True, False

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, str | None]:
        """See ControllerSettings: a target below `floor` counts as that."""
        lowest = floor(solver)
        if self.target >= lowest:
            return self, None
        return replace(self, target=lowest), messages.below_target(self.target, lowest, sampler)

    def controller(self, context: RunContext) -> Controller:
        """The controller of one region of a run."""
        return AdaptiveController(self, context)


@dataclass
class Gap:
    """What lay between two computed evaluations.

    passed: evaluations; span: in sigma; expected: error at its end, None where unknown; reused: features filled it.
    """

    passed: int = 1
    span: float = 0.0
    expected: float | None = None
    reused: bool = False


@dataclass(frozen=True)
class Errors:
    """Errors of the latent's slope at the end of `gap`, None where unknown.

    predicted: by the forecasts of all signals; reused: by features, for each evaluation of their age; deep: those
    leave out more than half of a pass.
    """

    gap: Gap
    predicted: float | None = None
    reused: float | None = None
    deep: bool = False


class AdaptiveController:
    """The gap between computed evaluations during one run of one region, and what fills it."""

    last: Evaluation | None  # the last computed evaluation
    gap: Gap  # the one before it, or that is now

    def __init__(self, settings: AdaptiveSettings, context: RunContext) -> None:
        """settings: with a target that is no less than `floor`."""
        self.high, self.low = settings.window.sigmas(context.percent_to_sigma)
        self.readback = Readback(context.late)
        self.budget = context.solver.law.budget(settings.target)  # sum of squared errors still to come
        self.spent = 0.0  # and of those that were made
        self.longest = settings.longest if context.solver.corrects else LONGEST_UNCORRECTED
        self.skip_by = Action.PREDICT if context.predicts else Action.ESTIMATE
        self.revisits = False  # the sampler comes back to a sigma, as those with two calls a step do
        self._begin()

    def choose(self, evaluation: Evaluation, signals: Signals) -> Step:
        """See Controller."""
        wanted = [*([signals.output] if signals.output else []), *signals.differences]
        known = _known(wanted)
        if self.last is None or len(known) < len(wanted) or not (known or signals.probe):
            return COMPUTE
        if self.last.ordinal == evaluation.ordinal - 1:
            self._choose_gaps(evaluation, self._read(known, signals.probe))
        if evaluation.is_last or not self.low <= evaluation.sigma <= self.high:
            return COMPUTE
        age = evaluation.ordinal - self.last.ordinal
        if age < self.reuse_gap:
            return Step(Action.REUSE)
        return Step(self.skip_by) if age < self.skip_gap else COMPUTE

    def unit(self, pass_: Pass, cond: Tensor) -> Tensor | None:
        """See Controller."""
        return pass_.space.unit(pass_.x)

    def took(self, evaluation: Evaluation, action: Action) -> None:
        """See Controller."""
        self.gap.reused |= action is Action.REUSE
        if action is not Action.COMPUTE:
            return
        if self.last is not None:
            self.gap.passed = evaluation.ordinal - self.last.ordinal
            self.gap.span = self.last.sigma - evaluation.sigma
        self.last = evaluation

    def reset(self) -> None:
        """See Controller."""
        self.readback.reset()
        self._begin()

    def finish(self, signals: Signals) -> float | None:
        """See Controller."""
        known = _known([signals.output, *signals.differences])
        for _ in range(1 + self.readback.late):  # what is on its way, and what the last gap did
            self._spend(self._read(known, signals.probe))
        return self.spent

    def _begin(self) -> None:
        self.last, self.gap = None, Gap()
        self.skip_gap = self.reuse_gap = 1

    def _read(self, signals: Sequence[Signal], probe: Probe | None) -> Errors:
        """What is known at the end of the last gap."""
        errors = {"reused": probe.error} if probe and probe.error is not None else {}
        predicted = [s.error for s in signals if s.error is not None]
        if predicted:
            errors = {"predicted": sum(predicted[1:], predicted[0]), **errors}
        if not errors:
            return Errors(self.gap)
        about = self.gap, tuple(errors), bool(probe and probe.deep)
        means = torch.stack([error.pow(2).mean().sqrt() for error in errors.values()])
        values, about = self.readback.read(means, about)
        if values is None:
            return Errors(Gap())
        gap, names, deep = about
        return Errors(gap, **dict(zip(names, values, strict=True)), deep=deep)

    def _choose_gaps(self, evaluation: Evaluation, errors: Errors) -> None:
        """Set the gaps that begin with the last computed evaluation."""
        assert self.last is not None
        gap = errors.gap
        self._spend(errors)
        sigmas = [self.last.sigma, evaluation.sigma, *evaluation.following]
        self._choose_skipping(errors, sigmas)
        # Skipping the negative pass saves half of what skipping a step does, and less than deep features do.
        better = self.skip_gap == 1 or errors.deep
        self.reuse_gap = self._longest(errors.reused, LONGEST_REUSE, sigmas) if better else 1
        longest = max(self.skip_gap, self.reuse_gap)
        self.gap = Gap(expected=errors.predicted and errors.predicted / gap.passed * longest)

    def _spend(self, errors: Errors) -> None:
        """Take what a gap did from the budget."""
        gap = errors.gap
        error = errors.reused * gap.passed if gap.reused and errors.reused is not None else errors.predicted
        if gap.passed > 1 and error is not None:  # a window of a long video may have been away
            self.budget -= (error * gap.span) ** 2
            self.spent += (error * gap.span) ** 2

    def _choose_skipping(self, errors: Errors, sigmas: Sequence[float]) -> None:
        """Set the gap of predictions; sigmas: of the last computed evaluation and all later."""
        error, gap = errors.predicted, errors.gap
        again = abs(sigmas[0] - sigmas[1]) < 1e-6 * sigmas[0]
        self.revisits |= again
        # Errors grow with the gap, and stay the same for equal gaps. Where one grew more, it is taken to go on so.
        growth = 1.0
        if error and gap.expected and not self.revisits:
            growth = min(max(error / gap.expected, 1.0), GROWTH)
        # An error that was seen on small steps says nothing of far larger ones.
        reach = 0.0 if self.revisits else REACH_LATENT * gap.span
        longest = self._longest(error and growth * error / gap.passed, self.longest, sigmas, reach)
        # Where a sigma was visited just before, nearly the same is computed twice: only that is skipped then.
        wanted = longest if again or not self.revisits else 1
        self.skip_gap = min(wanted, self.skip_gap + 1)

    def _longest(self, rate: float | None, longest: int, sigmas: Sequence[float], reach: float = 0.0) -> int:
        """The longest gap that leaves as much for every gap after it.

        rate: error for each evaluation of it; reach: in sigma, beyond it the rate says nothing, 0 for no such limit.
        """
        left, best = len(sigmas) - 1, 1
        if rate is None:
            return best
        for gap in range(2, longest + 1):
            span = sigmas[0] - sigmas[min(gap, left)]
            if (rate * gap * span) ** 2 * left / gap <= self.budget and (span <= reach or not reach):
                best = gap
        return best


def _known(signals: Sequence[Signal | None]) -> list[Signal]:
    """Those that can be predicted."""
    return [signal for signal in signals if signal and signal.known > 1]


def floor(solver: Solver) -> float:
    """The lowest target in dB that is served with `solver`."""
    return FLOOR if solver.corrects else FLOOR_NOISY if solver.noise else FLOOR_UNCORRECTED
