"""Two nodes on one model: one says which evaluations are predicted, the other is CFG-Cache.

The first decides. Where it lets the network run for all branches, CFG-Cache may run the conditional one alone, at its
own interval and tolerance; but not right after predicted evaluations, whose errors only a whole one shows. Keyframes of
FRDiff stay whole, for features, outputs and differences all begin anew there: beside it CFG-Cache acts where features
are reused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..actions import Action, Step
from ..clock import Evaluation
from ..protocols import Controller, ControllerSettings, Pass, RunContext, Signals
from ..solvers import Solver
from .interval import IntervalSettings
from .planned import MixSettings


@dataclass(frozen=True)
class TogetherSettings:
    """steps: settings of the controller that predicts evaluations; guidance: CFG-Cache."""

    steps: ControllerSettings
    guidance: IntervalSettings
    reference_only = False

    @property
    def corrects(self) -> bool:
        """See ControllerSettings."""
        return self.steps.corrects

    @property
    def probes(self) -> bool:
        """See ControllerSettings."""
        return self.steps.probes

    @property
    def longest_reuse(self) -> int | None:
        """See ControllerSettings."""
        return self.steps.longest_reuse

    @property
    def holds_slope(self) -> bool:
        """See ControllerSettings."""
        return self.steps.holds_slope

    @property
    def uses_errors(self) -> bool:
        """See ControllerSettings."""
        return self.steps.uses_errors or self.guidance.uses_errors

    @property
    def weighs(self) -> bool:
        """See ControllerSettings."""
        return self.steps.weighs

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, str | None]:
        """See ControllerSettings."""
        steps, note = self.steps.served(solver, sampler)
        return replace(self, steps=steps), note

    def controller(self, context: RunContext) -> Controller:
        """The controller of one region of a run."""
        return TogetherController(self, context)


class TogetherController:
    """Both during one run of one region."""

    def __init__(self, settings: TogetherSettings, context: RunContext) -> None:
        self.steps, self.guidance = settings.steps.controller(context), settings.guidance.controller(context)
        self.keyframes = isinstance(settings.steps, MixSettings)
        self.predicted = False  # the last evaluation was

    def choose(self, evaluation: Evaluation, signals: Signals) -> Step:
        """See Controller."""
        step = self.steps.choose(evaluation, signals)
        if step.weighs or step.action is not (Action.REUSE if self.keyframes else Action.COMPUTE):
            return step
        if not self.keyframes and (self.predicted or (signals.output and not signals.output.ready)):
            return step
        estimate = self.guidance.choose(evaluation, replace(signals, output=None, differences=signals.estimates))
        return replace(estimate, reuses=self.keyframes) if estimate.action is Action.ESTIMATE else step

    def unit(self, pass_: Pass, cond: Tensor) -> Tensor | None:
        """See Controller: the tolerance of CFG-Cache is relative to what the other measures by, if it does."""
        unit = self.steps.unit(pass_, cond)
        return self.guidance.unit(pass_, cond) if unit is None else unit

    def took(self, evaluation: Evaluation, action: Action) -> None:
        """See Controller."""
        self.predicted = action is Action.PREDICT
        self.steps.took(evaluation, action)
        self.guidance.took(evaluation, action)

    def reset(self) -> None:
        """See Controller."""
        self.predicted = False
        self.steps.reset()
        self.guidance.reset()

    def finish(self, signals: Signals) -> float | None:
        """See Controller."""
        return self.steps.finish(signals)
