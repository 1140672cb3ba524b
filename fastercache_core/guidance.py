"""CFG-Cache: skip the unconditional pass and rebuild its output from the conditional one.

FasterCache (arXiv 2410.19355) section 3.2, eq. 6-11. With D = uncond - cond at the last full
evaluation, D_low its low band and D_high = D - D_low, the paper's transform, mask, add and
inverse transform is linear and equals

    uncond = cond + w_low * D_low + w_high * D_high

so a skipped evaluation needs no transform at all. D lives in the network's own output space
(noise or velocity); there it changes slowly, while the denoised outputs differ by a factor
that moves with sigma.
"""
from dataclasses import dataclass, field

from .bands import split
from .clock import Window
from .gate import ErrorEstimate
from .measured import make_history
from .schedule import Interval, IntervalSchedule

WEIGHTS = ("none", "paper", "released")


@dataclass(frozen=True)
class GuidanceSettings:
    """How CFG-Cache skips and estimates.

    interval: one full evaluation in `interval.every`, inside its window.
    forecast: how the difference is carried forward, one of `measured.FORECAST_NAMES`.
    weights: "none"; "paper" = eq. 11, low band 1 + alpha before `switch`, high band 1 + alpha
        after it; "released" = the published code: both bands compound by (1 + alpha) with every
        skipped evaluation in a row, each inside its own window.
    radius: upper edge of the lowest band as a fraction of the shorter latent side.
    bands: how many bands "measured" fits; their edges are spread evenly from `radius` to 0.5.
    switch: t0 of eq. 11, as a fraction of sampling.
    """
    interval: Interval = field(default_factory=Interval)
    forecast: str = "measured"
    weights: str = "none"
    radius: float = 0.2
    bands: int = 2
    alpha_low: float = 0.2
    alpha_high: float = 0.2
    switch: float = 0.6
    low_window: Window = Window(0.0, 0.8)
    high_window: Window = Window(0.6, 1.0)


def paper_weights(before_switch, alpha_low, alpha_high):
    """(w_low, w_high) of eq. 11: one of the two bands is raised, by the side of t0 we are on."""
    return (1 + alpha_low, 1.0) if before_switch else (1.0, 1 + alpha_high)


def compound(weight, alpha, active):
    """Band weight of the released code after one more skipped evaluation in a row."""
    return weight * (1 + alpha) if active else weight


def band_edges(settings):
    """Upper edges of all bands but the last; the paper's weights know two bands only."""
    count = settings.bands if settings.weights == "none" else 2
    width = (0.5 - settings.radius) / (count - 1) if count > 1 else 0.0
    return tuple(settings.radius + width * i for i in range(count - 1))


class GuidanceCache:
    """CFG-Cache during one run, for one unconditional branch."""

    def __init__(self, settings, percent_to_sigma, error=None, history=None):
        """error: what watches the forecasts, an ErrorEstimate (None: a new one) or a Foresight; history: what
        carries the difference forward (None: by the forecast of the settings)."""
        self.settings = settings
        self.schedule = IntervalSchedule(settings.interval, percent_to_sigma)
        self.history = history or make_history(settings.forecast)
        self.edges = band_edges(settings)
        self.in_bands = settings.weights != "none" or settings.forecast == "measured"
        self.switch = float(percent_to_sigma(settings.switch))
        self.low_window = settings.low_window.sigmas(percent_to_sigma)
        self.high_window = settings.high_window.sigmas(percent_to_sigma)
        self.weights = (1.0, 1.0)
        self.error = error or ErrorEstimate()

    def may_estimate(self, evaluation):
        """True when the schedule allows it and enough differences are known."""
        return self.history.ready and self.schedule.may_skip(evaluation)

    def observe(self, evaluation, difference, unit=None):
        """Remember the difference uncond - cond of a full evaluation, in output space.

        unit: see ErrorEstimate.observe; None when nobody asks what forecasts are worth.
        """
        if unit is not None:
            self.error.observe(self.history, evaluation.sigma, difference, unit)
        bands = split(difference, self.edges) if self.in_bands else (difference,)
        self.history.push(evaluation.sigma, bands)
        self.schedule.computed(evaluation)
        self.weights = (1.0, 1.0)

    def effect(self, evaluation):
        """Foreseen relative change of the latent when the difference is estimated at `evaluation`."""
        return self.error.effect(self.history.nodes, evaluation)

    def estimate(self, evaluation, cond=None, scale=None, values=()):
        """Estimated uncond at `evaluation`: `cond` + `scale` * the foreseen difference, a new tensor.

        cond: [batch, ...], None for zero; scale: [batch, 1, ...], from output space to that of `cond`;
        values: weights of the newest differences, in place of the forecast's own.
        """
        if self.settings.weights == "none":
            return self.history.at(evaluation.sigma, cond, scale, values=values)
        self.weights = self._next_weights(evaluation.sigma)
        return self.history.at(evaluation.sigma, cond, scale, self.weights)

    def tensors(self):
        """Every tensor held."""
        return self.history.tensors()

    def reset(self):
        """Forget everything, so that the next evaluation is full."""
        self.history.clear()
        self.schedule.reset()

    def _next_weights(self, sigma):
        s = self.settings
        if s.weights == "paper":
            return paper_weights(sigma > self.switch, s.alpha_low, s.alpha_high)
        low, high = self.weights
        return (compound(low, s.alpha_low, _within(self.low_window, sigma)),
                compound(high, s.alpha_high, _within(self.high_window, sigma)))


def _within(window, sigma):
    return window[1] <= sigma <= window[0]
