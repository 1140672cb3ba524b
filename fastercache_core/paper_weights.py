"""The band weights of CFG-Cache: FasterCache (arXiv 2410.19355) section 3.2, eq. 6-11.

With D = uncond - cond at the last computed evaluation, D_low its low band and D_high = D - D_low, the paper's
transform, mask, add and inverse transform is linear and equals

    uncond = cond + w_low * D_low + w_high * D_high

so a skipped evaluation needs no transform at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .signal import DifferenceSettings

WEIGHTS = ("none", "paper", "released")


class PaperWeights:
    """(w_low, w_high) during one run.

    "paper" is eq. 11: low band 1 + alpha before t0, high band 1 + alpha after it. "released" is the published code:
    both bands compound by 1 + alpha with every skipped evaluation in a row, each inside its own window.
    """

    def __init__(self, settings: DifferenceSettings, percent_to_sigma: Callable[[float], float]) -> None:
        self.settings = settings
        self.switch = float(percent_to_sigma(settings.switch))
        self.low_window = settings.low_window.sigmas(percent_to_sigma)
        self.high_window = settings.high_window.sigmas(percent_to_sigma)
        self.computed()

    def computed(self) -> None:
        """The difference was computed: weights begin anew."""
        self._weights = (1.0, 1.0)

    def skipped(self, sigma: float) -> tuple[float, float]:
        """The weights at one more skipped evaluation, at `sigma`."""
        s = self.settings
        if s.weights == "paper":
            self._weights = paper_weights(sigma > self.switch, s.alpha_low, s.alpha_high)
        else:
            low, high = self._weights
            low *= 1 + s.alpha_low if _within(self.low_window, sigma) else 1.0
            high *= 1 + s.alpha_high if _within(self.high_window, sigma) else 1.0
            self._weights = low, high
        return self._weights


def paper_weights(before_switch: bool, alpha_low: float, alpha_high: float) -> tuple[float, float]:
    """(w_low, w_high) of eq. 11: one of the two bands is raised, by the side of t0."""
    return (1 + alpha_low, 1.0) if before_switch else (1.0, 1 + alpha_high)


def _within(window: tuple[float, float], sigma: float) -> bool:
    return window[1] <= sigma <= window[0]
