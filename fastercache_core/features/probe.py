"""The error of reused features: now and then a computed evaluation is run once more with them."""

from __future__ import annotations

from torch import Tensor

from ..clock import Evaluation

# The second probe comes so many evaluations after the first, and the waits grow by that factor: a probe costs what a
# reused pass does, and errors change slowly, but where a step is so many times as long as at the last probe.
WAIT, LATER, GROWN = 6, 3, 2.0
# Reused features were never off by less than this share of what the network's output changed by.
LEAST = 0.1


class Probe:
    """Probes of reused features during one run, and what they showed.

    error: of a feature one evaluation old, [batch], None before the first probe; least: what it will be at least, by
    what the output changed by; step: in sigma, from there to the next evaluation; deep: more than half of the pass was
    left out; in_vain: nothing is reused by what is known, so that no probe is paid for.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything, so that the next probe is due at once."""
        self._wait, self._next, self.in_vain = WAIT, 0, False
        self.error: Tensor | None = None
        self.least: Tensor | None = None
        self.step, self.deep = 0.0, False

    @property
    def known(self) -> Tensor | None:
        """The error, or the least that it can be before the first probe, [batch]."""
        return self.least if self.error is None else self.error

    def due(self, evaluation: Evaluation) -> bool:
        """True when `evaluation` should be run with reused features as well."""
        if evaluation.is_last or self.in_vain:
            return False
        grown = self.error is not None and 0 < GROWN * self.step < evaluation.step
        return grown or evaluation.ordinal >= self._next

    def observe(self, evaluation: Evaluation, error: Tensor, age: int, deep: bool) -> None:
        """Features that were `age` evaluations old gave the slope with `error` [batch].

        As those of forecasts, errors are taken to grow with the age.
        """
        self.error, self.step, self.deep = error / age, evaluation.step, deep
        self._next, self._wait = evaluation.ordinal + self._wait, self._wait * LATER

    def changed(self, evaluation: Evaluation, change: Tensor) -> None:
        """From one computed evaluation to the next, this one, the output's slope changed by `change` [batch]."""
        if self.error is None:
            self.least, self.step = LEAST * change, evaluation.step
