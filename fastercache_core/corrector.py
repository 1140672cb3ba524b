"""Correcting what forecasts got wrong, as soon as the next evaluation is computed.

A forecast continues a polynomial beyond its last node. Once a later value is known, the polynomial through both sides
gives the skipped value several times better, at no cost. By then the sampler has taken its step with the forecast, so
what that did to the latent is undone by what the sampler gets next, as in a predictor-corrector solver. For this the
solver's step must be known.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .clock import Evaluation
from .forecast import Forecaster, lagrange
from .solvers import Solver

# An error of the latent shrinks with the noise level where the network denoises it away, and stays where the network
# takes it for picture: this part of it is taken to stay.
STAYS = 0.5
# A step that is so many times smaller than the predicted one corrects nothing: what it gets would have to be as many
# times larger.
LARGEST = 100.0


@dataclass
class Skipped:
    """A forecast [batch, ...] that stood in for a signal, and how far it moves the latent: `weight` for one unit of the
    denoised latent, which is `scale` [batch, 1, ...] units of the signal."""

    evaluation: Evaluation
    forecast: Tensor
    scale: Tensor
    weight: float


class Corrector:
    """The forecasts of one signal since it was last computed, and what was last added to it."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.skipped: list[Skipped] = []
        self.last: float | None = None
        self.added: Tensor | None = None

    def predicted(self, evaluation: Evaluation, forecast: Tensor, scale: Tensor) -> Tensor | None:
        """Take `forecast` [batch, ...] as what stands in for the signal. Returns what to add to it, or None."""
        weight, before = self._weights(evaluation)
        self.skipped.append(Skipped(evaluation, forecast, scale, weight))
        return self._add(evaluation, self._echo(weight, before), scale)

    def computed(self, evaluation: Evaluation, forecaster: Forecaster, scale: Tensor) -> Tensor | None:
        """What to add to the value computed at `evaluation`, which `forecaster` has already: [batch, ...] or None."""
        weight, before = self._weights(evaluation)
        corrected = [skipped for skipped in self.skipped if abs(skipped.weight) < LARGEST * weight]
        shifts = [self._shift(evaluation, forecaster, skipped) / weight for skipped in corrected]
        self.skipped = []
        return self._add(evaluation, shifts + self._echo(weight, before), scale)

    def passed(self, evaluation: Evaluation, scale: Tensor) -> Tensor | None:
        """The signal was computed, but its forecaster has not taken the value: there is nothing to compare yet."""
        weight, before = self._weights(evaluation)
        return self._add(evaluation, self._echo(weight, before), scale)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        forecasts = [skipped.forecast for skipped in self.skipped]
        return forecasts if self.added is None else [*forecasts, self.added]

    def _weights(self, evaluation: Evaluation) -> tuple[float, float]:
        weight, before = self.solver.step_weights(self.last, evaluation.sigma, evaluation.sigma - evaluation.step)
        if self.skipped and self.skipped[-1].evaluation.sigma == self.last:
            self.skipped[-1].weight += before
        return weight, before

    def _echo(self, weight: float, before: float) -> list[Tensor]:
        """What cancels that the solver uses the last value once more, with what was added to it."""
        return [] if self.added is None or not (before and weight) else [self.added * (-before / weight)]

    def _add(self, evaluation: Evaluation, shifts: list[Tensor], scale: Tensor) -> Tensor | None:
        self.last, self.added = evaluation.sigma, sum(shifts[1:], shifts[0]) if shifts else None
        return None if self.added is None else self.added / scale

    def _shift(self, evaluation: Evaluation, forecaster: Forecaster, skipped: Skipped) -> Tensor:
        """How far the latent is from where it would be without one forecast."""
        then = skipped.evaluation
        true = forecaster.predict(then.sigma, values=lagrange(forecaster.nodes, then.sigma))
        before = then.sigma - then.step
        shrunk = (evaluation.sigma - evaluation.step) / before if before > 0 else 0.0  # 0 where sampling began again
        return (true - skipped.forecast) * skipped.scale * skipped.weight * (STAYS + (1 - STAYS) * shrunk)
