"""Carrying a quantity forward as it was seen to move: a forecast whose terms have measured gains.

The forecast is hold + g1 * (linear - hold) + g2 * (quadratic - linear). Whenever the true value
is computed, the terms that would have predicted it are fitted to it by least squares, and the
next forecasts use the gains of that fit. Everything stays on the device of the values.
"""
from dataclasses import dataclass
from itertools import pairwise

import torch

from .forecast import FORECASTS, History, lagrange, numbers

FORECAST_NAMES = ("measured", *FORECASTS)

# Gains before anything was measured, and what the fit leans to: the blend that served best on
# smooth trajectories.
PRIOR = (1.0, 2 / 3)
LEAN = 0.3        # weight of the prior in a fit, relative to the terms' own energy
MEMORY = 0.5      # weight of earlier fits against the newest one
LIMITS = (0.0, 1.25)
TINY = 1e-6       # keeps a fit well posed where there is nothing but a straight line


@dataclass
class Fit:
    """Running normal equations of every band and picture: tensors [bands, batch], no host numbers."""
    a11: torch.Tensor
    a12: torch.Tensor
    a22: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor

    def __add__(self, newer):
        return Fit(*(MEMORY * old + new for old, new in zip(vars(self).values(), vars(newer).values())))

    def gains(self, prior=PRIOR, lean=LEAN):
        """Least-squares (1, g1, g2), pulled towards `prior` and clamped: tensor [batch, bands, 3]."""
        a11, a22 = self.a11 * (1 + lean), self.a22 * (1 + lean) + TINY * self.a11
        b1, b2 = self.b1 + lean * prior[0] * self.a11, self.b2 + lean * prior[1] * self.a22
        determinant = (a11 * a22 - self.a12 ** 2).clamp_min(1e-30)
        g1 = (b1 * a22 - b2 * self.a12) / determinant
        g2 = (b2 * a11 - b1 * self.a12) / determinant
        return torch.stack([torch.ones_like(g1), g1.clamp(*LIMITS), g2.clamp(*LIMITS)]).movedim(-1, 0).mT


class MeasuredHistory(History):
    """The last values of a quantity in bands, newest first, with the gains seen so far.

    Gains are kept per band and per picture of the batch, so that no picture depends on its
    neighbours.
    """

    def __init__(self):
        super().__init__(FORECASTS["quadratic"])

    def push(self, sigma, bands):
        """Remember `bands` (tuple of tensors [batch, ...]) as computed at `sigma`, and learn from them."""
        kept = self.others(sigma)
        if len(kept) == self.depth:
            self._learn(sigma, torch.stack(bands))
        super().push(sigma, bands)

    def clear(self):
        """Forget everything."""
        super().clear()
        self.fit = self.gains = None

    def weights(self, sigma):
        """Weight of every value in the forecast at `sigma`, tensor [1 or batch, bands, nodes]."""
        terms = numbers(term_weights(self.nodes, sigma), self.stack)
        if self.gains is None:
            return (numbers([1.0, *PRIOR][:len(terms)], self.stack) @ terms).expand(1, self.stack.shape[1], -1)
        return self.gains @ terms

    def _learn(self, sigma, bands):
        terms = numbers(term_weights(self.nodes, sigma), self.stack)
        _, first, second = torch.tensordot(terms, self.stack, 1).flatten(3)
        fit = fit_terms((bands - self.stack[0]).flatten(2), first, second)
        self.fit = fit if self.fit is None else self.fit + fit
        self.gains = self.fit.gains()  # once, not at every evaluation that is skipped


def make_history(name):
    """The history that carries a quantity forward by the forecast `name`, one of FORECAST_NAMES."""
    return MeasuredHistory() if name == "measured" else History(FORECASTS[name])


def term_weights(nodes, sigma):
    """Weights of the values at `nodes` (newest first) in hold, linear - hold, quadratic - linear ... at `sigma`."""
    orders = [[*lagrange(nodes[:n], sigma), *[0.0] * (len(nodes) - n)] for n in range(1, len(nodes) + 1)]
    return [orders[0], *([b - a for a, b in zip(lower, higher)] for lower, higher in pairwise(orders))]


def fit_terms(change, first, second):
    """The Fit of what happened to what two terms foretold, all [bands, batch, numbers]."""
    dot = lambda a, b: (a * b).sum(-1)
    return Fit(dot(first, first), dot(first, second), dot(second, second),
               dot(change, first), dot(change, second))
