"""Putting right what forecasts got wrong, as soon as the next evaluation is computed.

A forecast continues a polynomial beyond its last node. Once a later value is known, the polynomial
through both sides tells the skipped value several times better, at no cost. By then the sampler has
taken its step with the forecast, so the difference between the two is added to what it gets next, as
the corrector of a predictor-corrector solver does: x moves by weight * output at every evaluation, so
outputs that were wrong by e_j are made good by e_j * weight_j / weight at the computed one.
"""
from .forecast import lagrange

# An error of the latent shrinks with the noise level where the network denoises it away, and stays as it
# is where the network takes it for picture: so much of it is taken to stay.
STAYS = 0.5


class Correction:
    """The forecasts of one signal since it was last computed."""

    def __init__(self):
        self.skipped = []

    def add(self, evaluation, forecast, weight):
        """Note that `forecast` [batch, ...] stood in for the signal at `evaluation`.

        weight: how far the latent moves for one unit of the signal, [batch, 1, ...].
        """
        self.skipped.append((evaluation, forecast, weight))

    def settle(self, evaluation, history, weight):
        """What to add to the signal's value at `evaluation`, which `history` knows already: [batch, ...].

        None when nothing was skipped since the signal was computed the last time.
        """
        shifts = [self._shift(evaluation, history, *skipped) / weight for skipped in self.skipped]
        self.clear()
        return sum(shifts) if shifts else None

    def clear(self):
        """Forget the forecasts."""
        self.skipped = []

    def _shift(self, evaluation, history, skipped, forecast, weight):
        known = history.at(skipped.sigma, values=lagrange(history.nodes, skipped.sigma))
        shrunk = (evaluation.sigma - evaluation.step) / (skipped.sigma - skipped.step)
        return (known - forecast) * weight * (STAYS + (1 - STAYS) * shrunk)
