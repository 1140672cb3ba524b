"""The adaptive controller: how often to compute, from how far the picture may be from full sampling.

Like the step size control of an ODE solver. Every computed evaluation shows, for free, the error of the forecast that
it made unnecessary. On three models and over 50 dB, the error of a picture was found to follow from these alone: error
of the slope times the span in sigma of the gap, relative to the latent, squares added up over the gaps. So the target
PSNR is an error budget that a run may spend. Carried ahead, an error grows with the gap; the longest gap is taken that
leaves enough for those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from .. import messages
from ..actions import COMPUTE, Action, Step
from ..clock import Evaluation, Window
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
# A gap may cost so many times an even share of the budget: most spend less than was expected of them, and what was
# spent counts for all later ones. One as long as the last may cost more: equal gaps are closer than mixed ones.
SHARE, STAY = 2.0, 8.0
# Up to so many times the gap it was seen at an error is taken to grow in proportion, beyond with the square: what was
# seen on small steps is weak evidence for large ones.
TRUSTED = 2.0
LONGEST = 8  # the longest gap of predictions
# A gap grows by one evaluation at a time, or to what spans no more than this part of the noise level.
SMALL = 0.03
# Error of a held slope over the first step, for a step as long as the noise level, in proportion to the step: the
# largest that was seen on six models. It decides how many evaluations after the first one are skipped.
FIRST = 60.0
GROWTH = 3.0  # an error so many times the expected one counts as no larger: it may be a single bad forecast


@dataclass(frozen=True)
class AdaptiveSettings:
    """target: PSNR to full sampling in dB; window: the part of sampling in which to skip; longest: the longest gap from
    one computed evaluation to the next."""

    target: float = 42.0
    window: Window = Window()
    longest: int = LONGEST
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
class Seen:
    """An error that was seen at the end of a gap of `passed` evaluations that spanned `span` in sigma (0: that does not
    matter), whether errors are no larger than expected, and up to how many times that gap they grow in proportion."""

    error: float
    passed: int = 1
    span: float = 0.0
    steady: bool = False
    trusted: float = TRUSTED

    def at(self, gap: int, span: float = 0.0) -> float:
        """The error to expect at the end of a gap of that many evaluations and that span: it grows with the gap, or
        with its span where that grew more."""
        ratio = max(gap / self.passed, span / self.span if self.span else 0.0)
        return self.error * max(ratio, ratio**2 / self.trusted)

    def reaches(self, span: float) -> bool:
        """False for a span so much larger that the error says nothing of it."""
        return not self.span or span <= REACH_LATENT * self.span


@dataclass(frozen=True)
class Errors:
    """Errors of the latent's slope at the end of `gap`, None where unknown.

    predicted: by the forecasts of all signals; reused: by features, for each evaluation of their age, in steps of
    `step` in sigma; probed: that was measured, else it is the least that it can be; deep: features leave out more than
    half of a pass.
    """

    gap: Gap
    predicted: float | None = None
    reused: float | None = None
    step: float = 0.0
    probed: bool = False
    deep: bool = False

    @property
    def of_reuse(self) -> Seen | None:
        """The error of features one evaluation old: it grows with their age and with the span, whichever grew more."""
        return None if self.reused is None else Seen(self.reused, 1, self.step, trusted=inf)


PROBED = ("step", "probed", "deep")


class AdaptiveController:
    """The gap between computed evaluations during one run of one region, and what fills it."""

    last: Evaluation | None  # the last computed evaluation
    gap: Gap  # the one before it, or that is now

    def __init__(self, settings: AdaptiveSettings, context: RunContext) -> None:
        """settings: with a target that is no less than `floor`."""
        self.high, self.low = settings.window.sigmas(context.percent_to_sigma)
        self.readback = Readback(context.late)
        # Sum of squared errors still to come, as far as Euler's step would carry them; and of those that were made.
        self.carries = context.solver.amplifies(context.sigmas) ** 2
        self.budget, self.spent = context.solver.law.budget(settings.target) / self.carries, 0.0
        self.settings, self.solver, self.predicts = settings, context.solver, context.predicts
        self.revisits = False  # the sampler comes back to a sigma, as those with two calls a step do
        self._begin()

    def choose(self, evaluation: Evaluation, signals: Signals) -> Step:
        """See Controller."""
        signals = self._served(signals)
        wanted = [*([signals.output] if signals.output else []), *signals.differences]
        known = _known(wanted)
        if self.last is not None and _holds(signals):
            return self._hold(self.last, evaluation)
        if self.last is None or len(known) < len(wanted) or not (known or signals.probe):
            return COMPUTE
        if self.last.ordinal == evaluation.ordinal - 1:
            self._choose_gaps(evaluation, self._read(signals))
            if signals.probe:
                signals.probe.in_vain = self.in_vain
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
        signals = self._served(signals)
        for _ in range(1 + self.readback.late):  # what is on its way, and what the last gap did
            self._spend(self._read(signals))
        return self.spent

    def _begin(self) -> None:
        self.last, self.gap = None, Gap()
        self.skip_gap = self.reuse_gap = 1
        self.in_vain = False  # nothing will be reused by what is known: no probe is worth its cost

    def _hold(self, last: Evaluation, evaluation: Evaluation) -> Step:
        """What an evaluation does of which no error was seen yet, since only the first one was computed."""
        step, age = abs(last.step), evaluation.ordinal - last.ordinal
        if age == 1:
            error = Seen(FIRST * step / last.sigma**2, 1, step)
            self._choose_skipping(error, [last.sigma, evaluation.sigma, *evaluation.following])
        inside = self.low <= evaluation.sigma <= self.high and not evaluation.is_last
        return Step(Action.PREDICT) if inside and age < self.skip_gap else COMPUTE

    def _served(self, signals: Signals) -> Signals:
        """What is predicted at a skipped evaluation: where noise is added, the output only where it is alone."""
        guided, noise = bool(signals.differences), self.solver.noise
        signals = replace(signals, output=None) if noise and guided else signals
        self.skip_by = Action.PREDICT if self.predicts and not (noise and guided) else Action.ESTIMATE
        self.longest = self.settings.longest if self.solver.corrects or (noise and not guided) else LONGEST_UNCORRECTED
        return signals

    def _read(self, signals: Signals) -> Errors:
        """What is known at the end of the last gap."""
        probe = signals.probe
        errors = {"reused": probe.known} if probe and probe.known is not None else {}
        predicted = [s.error * weight for s, weight in signals.weighed() if s.known > 1 and s.error is not None]
        if predicted:
            errors = {"predicted": sum(predicted[1:], predicted[0]), **errors}
        if not errors:
            return Errors(self.gap)
        about = self.gap, tuple(errors), (probe.step, probe.error is not None, probe.deep) if probe else ()
        means = torch.stack([error.pow(2).mean().sqrt() for error in errors.values()])
        values, about = self.readback.read(means, about)
        if values is None:
            return Errors(Gap())
        gap, names, probed = about
        return Errors(gap, **dict(zip(names, values, strict=True)), **dict(zip(PROBED, probed, strict=False)))

    def _choose_gaps(self, evaluation: Evaluation, errors: Errors) -> None:
        """Set the gaps that begin with the last computed evaluation."""
        assert self.last is not None
        gap = errors.gap
        self._spend(errors)
        sigmas = [self.last.sigma, evaluation.sigma, *evaluation.following]
        self._choose_skipping(self._seen(errors), sigmas)
        # Skipping the negative pass saves half of what skipping a step does, and less than deep features do.
        better = self.skip_gap == 1 or errors.deep
        affordable = self._longest(errors.of_reuse, LONGEST_REUSE, sigmas) if better or not errors.probed else 1
        self.reuse_gap = affordable if errors.probed else 1
        # A probe costs what a reused pass does: the first one is run where, at best, features would fill long gaps.
        self.in_vain = errors.reused is not None and affordable < (2 if errors.probed else LONGEST_REUSE)
        longest = max(self.skip_gap, self.reuse_gap)
        expected = errors.predicted and Seen(errors.predicted, gap.passed).at(longest)
        self.gap = Gap(expected=expected)

    def _spend(self, errors: Errors) -> None:
        """Take what a gap did from the budget."""
        gap = errors.gap
        reused = errors.of_reuse if gap.reused else None
        error = reused.at(gap.passed, gap.span) if reused else errors.predicted
        if gap.passed > 1 and error is not None:  # a window of a long video may have been away
            self.budget -= (error * gap.span) ** 2
            self.spent += self.carries * (error * gap.span) ** 2

    def _choose_skipping(self, seen: Seen | None, sigmas: Sequence[float]) -> None:
        """Set the gap of predictions by the error that was seen; sigmas: of the last computed evaluation and later."""
        again = abs(sigmas[0] - sigmas[1]) < 1e-6 * sigmas[0]
        self.revisits |= again
        longest = self._longest(seen, self.longest, sigmas)
        # Where a sigma was visited just before, nearly the same is computed twice: only that is skipped then.
        wanted = longest if again or not self.revisits else 1
        small = sum(sigmas[0] - sigma <= SMALL * sigmas[0] for sigma in sigmas[1:])
        self.skip_gap = min(wanted, max(self.skip_gap + 1, small))

    def _seen(self, errors: Errors) -> Seen | None:
        """The error of predictions that the next gap is judged by."""
        error, gap = errors.predicted, errors.gap
        if error is None:
            return None
        if self.revisits:
            return Seen(error, gap.passed)
        # Where an error grew more than expected, it is taken to go on so.
        growth = min(max(error / gap.expected, 1.0), GROWTH) if gap.expected else 1.0
        return Seen(growth * error, gap.passed, abs(gap.span), steady=growth == 1.0)

    def _longest(self, seen: Seen | None, longest: int, sigmas: Sequence[float]) -> int:
        """The longest gap that costs no more than SHARE or STAY allow."""
        left, best = len(sigmas) - 1, 1
        if seen is None:
            return best
        for gap in range(2, min(longest, left) + 1):
            span = abs(sigmas[0] - sigmas[gap])
            shares = STAY if seen.steady and gap == self.skip_gap else SHARE
            allowed = min(shares * gap / left, 1.0) * self.budget
            if seen.reaches(span) and (seen.at(gap, span) * span) ** 2 <= allowed:
                best = gap
        return best


def _known(signals: Sequence[Signal | None]) -> list[Signal]:
    """Those that can be predicted."""
    return [signal for signal in signals if signal and signal.known > 1]


def _holds(signals: Signals) -> bool:
    """True where there is one value of the conditional output and no other branch."""
    return signals.output is not None and signals.output.known == 1 and not signals.differences


def floor(solver: Solver) -> float:
    """The lowest target in dB that is served with `solver`."""
    return FLOOR if solver.corrects else FLOOR_NOISY if solver.noise and solver.known else FLOOR_UNCORRECTED
