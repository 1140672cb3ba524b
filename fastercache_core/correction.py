"""Putting right what forecasts got wrong, as soon as the next evaluation is computed.

A forecast continues a polynomial beyond its last node. Once a later value is known, the polynomial
through both sides tells the skipped value several times better, at no cost. By then the sampler has
taken its step with the forecast, so what that did to the latent is undone by what the sampler gets
next, as the corrector of a predictor-corrector solver does. For this the solver's step must be known.
"""
from dataclasses import dataclass
from math import log

import torch

from .clock import Evaluation
from .forecast import lagrange

# An error of the latent shrinks with the noise level where the network denoises it away, and stays as it
# is where the network takes it for picture: so much of it is taken to stay.
STAYS = 0.5

# How far a step moves the latent for one unit of the denoised latent of the evaluation before. Given: the
# step's share of what is left to do, and how far it goes and the one before it went in log sigma.
SOLVERS = {
    "euler": lambda share, ahead, behind: 0.0,
    "dpmpp_2m": lambda share, ahead, behind: -share * ahead / behind / 2,  # arXiv 2211.01095, algorithm 2
    "res_multistep": lambda share, ahead, behind: -(ahead - share) / behind,  # arXiv 2308.02157
}


def step_weights(solver, last, sigma, following):
    """How far a step of `solver` from `sigma` to `following` moves the latent for one unit of the denoised
    latent there, and for one of that at `last`, the sigma before it (None: there is none)."""
    share = 1 - following / sigma
    if last is None or following <= 0:
        return share, 0.0
    before = SOLVERS[solver](share, log(sigma / following), log(last / sigma))
    return share - before, before


@dataclass
class Skipped:
    """A forecast [batch, ...] that stood in for a signal, and how far it moves the latent: `weight` for one
    unit of the denoised latent, which is `scale` [batch, 1, ...] units of the signal."""
    evaluation: Evaluation
    forecast: torch.Tensor
    scale: torch.Tensor
    weight: float


class Correction:
    """The forecasts of one signal since it was last computed, and what was last added to it."""

    def __init__(self, solver="euler"):
        """solver: one of SOLVERS."""
        self.solver = solver
        self.clear()

    def clear(self):
        """Forget everything."""
        self.skipped, self.last, self.added = [], None, None

    def forecast(self, evaluation, forecast, scale):
        """Note that `forecast` [batch, ...] stands in for the signal. Returns what to add to it, or None."""
        weight, before = self._weights(evaluation)
        self.skipped.append(Skipped(evaluation, forecast, scale, weight))
        return self._add(evaluation, self._echo(weight, before), scale)

    def settle(self, evaluation, history, scale):
        """What to add to the signal's value at `evaluation`, which `history` knows already: [batch, ...] or None."""
        weight, before = self._weights(evaluation)
        shifts = [self._shift(evaluation, history, skipped) / weight for skipped in self.skipped]
        self.skipped = []
        return self._add(evaluation, shifts + self._echo(weight, before), scale)

    def tensors(self):
        """Every tensor held."""
        forecasts = [skipped.forecast for skipped in self.skipped]
        return forecasts if self.added is None else [*forecasts, self.added]

    def _weights(self, evaluation):
        weight, before = step_weights(self.solver, self.last, evaluation.sigma, evaluation.sigma - evaluation.step)
        if self.skipped:
            self.skipped[-1].weight += before
        return weight, before

    def _echo(self, weight, before):
        """What makes good that the solver uses the last value once more, with what was added to it."""
        return [] if self.added is None or not before else [self.added * (-before / weight)]

    def _add(self, evaluation, shifts, scale):
        self.last, self.added = evaluation.sigma, sum(shifts) if shifts else None
        return self.added / scale if shifts else None

    def _shift(self, evaluation, history, skipped):
        """How far the latent is from where it would be without one forecast."""
        then = skipped.evaluation
        known = history.at(then.sigma, values=lagrange(history.nodes, then.sigma))
        shrunk = (evaluation.sigma - evaluation.step) / (then.sigma - then.step)
        return (known - skipped.forecast) * skipped.scale * skipped.weight * (STAYS + (1 - STAYS) * shrunk)
