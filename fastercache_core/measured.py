"""Carrying a quantity forward as it was seen to move: a forecast whose terms have measured gains.

The forecast is hold + g1 * (linear - hold) + g2 * (quadratic - linear). Whenever the true value
is computed, the terms that would have predicted it are fitted to it by least squares, and the
next forecasts use the gains of that fit. Everything stays on the device of the values.
"""
from dataclasses import dataclass

import torch

from .forecast import FORECASTS, History, combine, lagrange

FORECAST_NAMES = ("measured", *FORECASTS)

NODES = 3
# Gains before anything was measured, and what the fit leans to: the blend that served best on
# smooth trajectories.
PRIOR = (1.0, 2 / 3)
LEAN = 0.3        # weight of the prior in a fit, relative to the terms' own energy
MEMORY = 0.5      # weight of earlier fits against the newest one
LIMITS = (0.0, 1.25)


@dataclass
class Fit:
    """Running normal equations of one band: tensors [batch, 1, ...], no host numbers."""
    a11: torch.Tensor
    a12: torch.Tensor
    a22: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor

    def __add__(self, newer):
        return Fit(*(MEMORY * old + new for old, new in zip(vars(self).values(), vars(newer).values())))

    def gains(self):
        """Least-squares (g1, g2), pulled towards PRIOR and clamped."""
        a11, a22 = self.a11 * (1 + LEAN), self.a22 * (1 + LEAN)
        b1, b2 = self.b1 + LEAN * PRIOR[0] * self.a11, self.b2 + LEAN * PRIOR[1] * self.a22
        determinant = (a11 * a22 - self.a12 ** 2).clamp_min(1e-30)
        g1 = (b1 * a22 - b2 * self.a12) / determinant
        g2 = (b2 * a11 - b1 * self.a12) / determinant
        return g1.clamp(*LIMITS), g2.clamp(*LIMITS)


class MeasuredHistory:
    """The last values of a quantity in bands, newest first, with the gains seen so far.

    Gains are kept per band and per picture of the batch, so that no picture depends on its
    neighbours.
    """

    def __init__(self):
        self.values = []
        self.fits = None
        self.gains = None

    def push(self, sigma, bands):
        """Remember `bands` (tuple of tensors [batch, ...]) as computed at `sigma`, and learn from them."""
        kept = [v for v in self.values if abs(v[0] - sigma) > 1e-6 * max(abs(sigma), 1e-6)]
        if len(kept) == NODES:
            self._learn(sigma, bands, kept)
        self.values = [(sigma, bands), *kept[:NODES - 1]]

    def clear(self):
        """Forget everything."""
        self.values, self.fits, self.gains = [], None, None

    @property
    def ready(self):
        """True when there are as many values as the highest term needs."""
        return len(self.values) == NODES

    def at(self, sigma):
        """Forecast of every band at `sigma`: a tuple of new tensors."""
        gains = self.gains or [PRIOR] * len(self.values[0][1])
        return tuple(self._band(i, sigma, g1, g2) for i, (g1, g2) in enumerate(gains))

    @property
    def nodes(self):
        """Sigmas of the values held, newest first."""
        return [sigma for sigma, _ in self.values]

    def tensors(self):
        """Every tensor held."""
        return [tensor for _, bands in self.values for tensor in bands]

    def _band(self, band, sigma, g1, g2):
        hold, linear, quadratic = term_weights(self.nodes, sigma)
        weights = [h + g1 * (l - h) + g2 * (q - l) for h, l, q in zip(hold, linear, quadratic)]
        return combine([bands[band] for _, bands in self.values], weights)

    def _learn(self, sigma, bands, kept):
        fits = [_fit(band, [value[i] for _, value in kept], [s for s, _ in kept], sigma)
                for i, band in enumerate(bands)]
        self.fits = fits if self.fits is None else [old + new for old, new in zip(self.fits, fits)]
        self.gains = [fit.gains() for fit in self.fits]  # once, not at every evaluation that is skipped


def make_history(name):
    """The history that carries a quantity forward by the forecast `name`, one of FORECAST_NAMES."""
    return MeasuredHistory() if name == "measured" else History(FORECASTS[name])


def term_weights(nodes, sigma):
    """Weights of three values (newest first) in their hold, linear and quadratic forecast at `sigma`."""
    return [1.0, 0.0, 0.0], [*lagrange(nodes[:2], sigma), 0.0], lagrange(nodes, sigma)


def _fit(band, values, nodes, sigma):
    hold, linear, quadratic = term_weights(nodes, sigma)
    first = sum(v * (l - h) for v, l, h in zip(values, linear, hold))
    second = sum(v * (q - l) for v, q, l in zip(values, quadratic, linear))
    change = band - values[0]
    dot = lambda a, b: (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))
    return Fit(dot(first, first), dot(first, second), dot(second, second),
               dot(change, first), dot(change, second))
