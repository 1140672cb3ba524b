"""Fixed intervals, the papers' way: every so many evaluations are computed, once forecasts are good enough.

With a tolerance, skipping begins when the error of the forecast is small: at an evaluation that is computed anyway, the
forecast that it would have replaced is compared with it, for free. Like the local error of an ODE solver, that error is
carried ahead by the node polynomial of the forecast, and what counts is what it does to the latent: error of the
latent's slope times the step in sigma. Once skipping has begun it goes on well beyond that: evenly spaced forecasts
have errors that partly cancel, a schedule that hesitates loses more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..actions import COMPUTE, Action, Step
from ..clock import Evaluation, Interval
from ..protocols import Controller, ControllerSettings, Pass, RunContext, Signals
from ..solvers import Solver


@dataclass(frozen=True)
class IntervalSettings:
    """predict, estimate: how often an evaluation is computed between predicted ones, or all of its branches between
    estimated ones; None for never. tolerance: effect of one skipped evaluation, as a fraction of the denoised latent,
    at which skipping begins, None to skip whatever the error; patience: how many times that it may grow to."""

    predict: Interval | None = None
    estimate: Interval | None = None
    tolerance: float | None = None
    patience: float = 8.0
    corrects, probes, longest_reuse, reference_only, holds_slope = False, False, None, True, False
    weighs = False

    @property
    def uses_errors(self) -> bool:
        """See ControllerSettings."""
        return self.tolerance is not None

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, str | None]:
        """See ControllerSettings."""
        return self, None

    def controller(self, context: RunContext) -> Controller:
        """The controller of one region of a run."""
        return IntervalController(self, context)


class IntervalController:
    """Fixed intervals during one run of one region."""

    def __init__(self, settings: IntervalSettings, context: RunContext) -> None:
        self.tolerance = settings.tolerance
        self.estimates, self.reuses = context.estimates, context.reuses
        to_sigma = context.percent_to_sigma
        self.predict = Schedule(settings.predict, to_sigma) if settings.predict else None
        self.estimate = Schedule(settings.estimate, to_sigma) if settings.estimate else None
        self.may_predict, self.may_estimate = (Tolerance(settings.tolerance, settings.patience) for _ in range(2))

    def choose(self, evaluation: Evaluation, signals: Signals) -> Step:
        """See Controller."""
        output, differences = signals.output, [d for d in signals.differences if d and d.ready]
        if len(differences) == len(signals.differences):
            predicts = output and output.ready and self.predict and self.predict.may_skip(evaluation)
            if output and predicts and self.may_predict.allows(local_errors(signals, evaluation)):
                return Step(Action.PREDICT)
            if differences and self.estimate and self.estimate.may_skip(evaluation):
                # An error may be as large as the share of the work that it saves.
                share = len(differences) / (len(differences) + 1)
                if self.may_estimate.allows(error / share for error in local_errors(signals, evaluation, output=False)):
                    return Step(Action.ESTIMATE, reuses=True)
        # A difference is only meaningful between branches that were computed alike.
        alike = not (self.estimates and signals.differences)
        return Step(Action.REUSE) if self.reuses and alike else COMPUTE

    def unit(self, pass_: Pass, cond: Tensor) -> Tensor | None:
        """See Controller."""
        return None if self.tolerance is None else pass_.space.unit(cond)

    def took(self, evaluation: Evaluation, action: Action) -> None:
        """See Controller."""
        for schedule in (self.predict, self.estimate):
            if schedule and action is Action.COMPUTE:
                schedule.computed_at = evaluation.ordinal

    def reset(self) -> None:
        """See Controller."""
        for schedule in (self.predict, self.estimate):
            if schedule:
                schedule.computed_at = None
        self.may_predict.opened = self.may_estimate.opened = False

    def finish(self, signals: Signals) -> float | None:
        """See Controller: local errors say when to begin, and are not added up."""
        return None


class Schedule:
    """An interval during one run. What ends a run is never skipped, see Evaluation.ends."""

    def __init__(self, interval: Interval, percent_to_sigma: Callable[[float], float]) -> None:
        self.every = interval.every
        self.high, self.low = interval.window.sigmas(percent_to_sigma)
        self.computed_at: int | None = None

    def may_skip(self, evaluation: Evaluation) -> bool:
        """True when the interval allows `evaluation` to be skipped."""
        if self.computed_at is None or evaluation.ends or not self.low <= evaluation.sigma <= self.high:
            return False
        return evaluation.ordinal - self.computed_at < self.every


class Tolerance:
    """Whether an action is allowed by its error, during one run; always where the tolerance is None."""

    def __init__(self, tolerance: float | None, patience: float) -> None:
        self.tolerance, self.patience = tolerance, patience
        self.opened = False

    def allows(self, errors: Iterable[float]) -> bool:
        """True when the sum of `errors` is small enough; they are not looked at where no tolerance is set."""
        if self.tolerance is None:
            return True
        self.opened = sum(errors) <= self.tolerance * (self.patience if self.opened else 1.0)
        return self.opened


def local_errors(signals: Signals, evaluation: Evaluation, output: bool = True) -> Iterable[float]:
    """Expected relative change of the latent when each of `signals` is predicted at `evaluation`.

    Infinite before a forecast was compared. output: with that of the conditional branch.
    """
    for signal, weight in signals.weighed(output):
        rate = weight * signal.largest_error() / node_product(signal.error_nodes, signal.error_sigma)
        yield rate * evaluation.step * node_product(signal.forecaster.nodes, evaluation.sigma)


def node_product(nodes: Sequence[float], sigma: float) -> float:
    """|(sigma - s0)(sigma - s1)|: how the error of a forecast from the two newest nodes grows."""
    product = 1.0
    for node in nodes[:2]:
        product *= max(abs(sigma - node), 1e-9)
    return product
