"""When skipping may begin: error control by what the forecasts of this very run were worth.

At an evaluation that is computed anyway, the forecast it would have replaced is compared with
it, for free. Like the local error of an ODE solver, that error is carried ahead by the node
polynomial of the forecast, and what counts is what it does to the latent: error of the latent's
slope times the step in sigma.

The gate opens when that effect is small and then stays open well beyond: evenly spaced forecasts
have errors that partly cancel, a schedule that hesitates loses more than it saves.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class GateSettings:
    """tolerance: effect of one skipped evaluation, as a fraction of the denoised latent, at which
    skipping begins. patience: how many times that it may grow to before skipping stops again."""
    tolerance: float = 16e-3
    patience: float = 8.0


class Gate:
    """Whether an action is worth its error, during one run. Without settings it is always open."""

    def __init__(self, settings):
        self.settings = settings
        self.opened = False

    def allows(self, effects):
        """True when the sum of `effects` (floats, see ErrorEstimate.effect) is small enough.

        effects: an iterable, not consumed when the gate has no settings.
        """
        if self.settings is None:
            return True
        limit = self.settings.tolerance * (self.settings.patience if self.opened else 1.0)
        self.opened = sum(effects) <= limit
        return self.opened


class ErrorEstimate:
    """What the forecast of one signal is worth, from the last evaluation that computed it."""

    def __init__(self):
        self.pending = None
        self.measured = float("inf")

    def observe(self, history, sigma, true, unit):
        """Compare the forecast of a History at `sigma` with the truth, if it is ready for one.

        true: [batch, ...]; unit: [batch], turns an error into a relative one of the latent's slope.
        """
        if history.ready:
            error = (rms(history.at(sigma) - true) * unit).max()
            self.pending = error, node_product(history.nodes, sigma)

    def effect(self, nodes, evaluation):
        """Foreseen relative change of the latent when `evaluation` is forecast from `nodes`, a float.

        Infinite before anything was observed.
        """
        return self._rate() * evaluation.step * node_product(nodes, evaluation.sigma)

    def _rate(self):
        """Error of the latent's slope for one unit of the node polynomial, a float.

        Reads one number from the device, at a moment when the host has waited for it anyway.
        """
        if self.pending is not None:
            self.measured, self.pending = float(self.pending[0]) / self.pending[1], None
        return self.measured


def rms(x):
    """Root mean square of each picture of a batch, tensor [batch]."""
    return x.flatten(1).pow(2).mean(1).sqrt()


def node_product(nodes, sigma):
    """|(sigma - s0)(sigma - s1)|: how the error of a forecast from the two newest nodes grows."""
    product = 1.0
    for node in nodes[:2]:
        product *= max(abs(sigma - node), 1e-9)
    return product
