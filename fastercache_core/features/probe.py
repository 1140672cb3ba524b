"""The error of reused features: now and then a computed evaluation is run once more with them."""

from __future__ import annotations

from torch import Tensor

from ..clock import Evaluation

# The second probe comes so many evaluations after the first, and the waits grow by that factor: a probe costs what a
# reused pass does, and errors change slowly.
WAIT, LATER = 6, 3


class Probe:
    """Probes of reused features during one run, and what they showed.

    error: of a feature one evaluation old, [batch], None before the first probe; deep: more than half of the pass was
    left out.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything, so that the next probe is due at once."""
        self._wait, self._next = WAIT, 0
        self.error: Tensor | None = None
        self.deep = False

    def due(self, evaluation: Evaluation) -> bool:
        """True when `evaluation` should be run with reused features as well."""
        return evaluation.ordinal >= self._next and not evaluation.is_last

    def observe(self, evaluation: Evaluation, error: Tensor, age: int, deep: bool) -> None:
        """Features that were `age` evaluations old gave the slope with `error` [batch].

        As those of forecasts, errors are taken to grow with the age.
        """
        self.error, self.deep = error / age, deep
        self._next, self._wait = evaluation.ordinal + self._wait, self._wait * LATER
