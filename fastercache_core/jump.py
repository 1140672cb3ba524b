"""Evaluations without the network: the conditional output forecast from earlier evaluations.

The reduced-NFE part of FRDiff (arXiv 2312.03517) with a polynomial in sigma in place of its
held score. The other branches follow from their differences to this one, see `guidance`.
"""
from dataclasses import dataclass, field

from .bands import split
from .gate import ErrorEstimate
from .measured import make_history
from .schedule import Interval, IntervalSchedule

# Edge of the low band of "measured", a fraction of the shorter latent side.
RADIUS = 0.2


@dataclass(frozen=True)
class JumpSettings:
    """interval: one computed evaluation in `interval.every`; forecast: one of `measured.FORECAST_NAMES`."""
    interval: Interval = field(default_factory=Interval)
    forecast: str = "measured"


class JumpCache:
    """The conditional branch's output and its forecast, during one run."""

    def __init__(self, settings, percent_to_sigma, error=None):
        """error: what watches the forecasts, an ErrorEstimate (None: a new one) or a Foresight."""
        self.schedule = IntervalSchedule(settings.interval, percent_to_sigma)
        self.history = make_history(settings.forecast)
        self.error = error or ErrorEstimate()
        self.in_bands = settings.forecast == "measured"

    def may_jump(self, evaluation):
        """True when the schedule allows it and enough outputs are known."""
        return self.history.ready and self.schedule.may_skip(evaluation)

    def observe(self, evaluation, cond, unit=None):
        """Remember the conditional output of a computed evaluation, in output space.

        unit: see ErrorEstimate.observe; None when nobody asks what forecasts are worth.
        """
        if unit is not None:
            self.error.observe(self.history, evaluation.sigma, cond, unit)
        bands = split(cond, (RADIUS,)) if self.in_bands else (cond,)
        self.history.push(evaluation.sigma, bands)
        self.schedule.computed(evaluation)

    def effect(self, evaluation):
        """Foreseen relative change of the latent when the output is forecast at `evaluation`."""
        return self.error.effect(self.history.nodes, evaluation)

    def cond(self, evaluation, values=()):
        """Forecast of the conditional output at `evaluation`, a new tensor in output space.

        values: weights of the newest outputs, in place of the forecast's own.
        """
        return self.history.at(evaluation.sigma, values=values)

    def tensors(self):
        """Every tensor held."""
        return self.history.tensors()

    def reset(self):
        """Forget everything, so that the next evaluation is computed."""
        self.history.clear()
        self.schedule.reset()
