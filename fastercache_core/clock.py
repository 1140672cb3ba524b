"""Where a sampling run is: the evaluations it has made, by ordinal and sigma, and windows of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

# Samplers of flow models start a hair below the first sigma; a sigma counts as on the grid within this.
GRID_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Window:
    """A part of sampling as fractions of it: 0.0 is the first step, 1.0 the end."""

    start: float = 0.0
    end: float = 1.0

    def sigmas(self, percent_to_sigma: Callable[[float], float]) -> tuple[float, float]:
        """Return (highest, lowest) sigma of the window, by the model's own `percent_to_sigma`."""
        return float(percent_to_sigma(self.start)), float(percent_to_sigma(self.end))


@dataclass(frozen=True)
class Interval:
    """Compute one evaluation in `every` and skip the others, inside a window of sampling."""

    every: int = 2
    window: Window = field(default_factory=Window)


@dataclass(frozen=True)
class Evaluation:
    """One call of the network by the sampler, for all branches.

    progress: from 0 at the first step to 1 at the last step of this run; step: distance in sigma to the next grid
    sigma; following: the grid sigmas still to come, the end of sampling last.
    """

    ordinal: int
    sigma: float
    progress: float
    is_last: bool
    step: float = 0.0
    following: tuple[float, ...] = ()


class Clock:
    """Counts the evaluations of one run.

    Samplers call the network once, twice or more a step and at sigmas off the grid, so an evaluation is known by its
    ordinal and its sigma, never by a step number.
    """

    def __init__(self, sigmas: Iterable[float]) -> None:
        """sigmas: as handed to the sampler, noisiest first, the end of sampling last."""
        *self.grid, self.end = [float(s) for s in sigmas]
        self.ordinal = -1

    def tick(self, sigma: float) -> Evaluation:
        """Count one more evaluation at `sigma` and return it."""
        self.ordinal += 1
        index, here = self._place(sigma)
        progress = max(index, 0) / max(len(self.grid) - 1, 1)
        is_last = here <= self.grid[-1]
        following = tuple(s for s in [*self.grid, self.end] if s < here) or (self.end,)
        return Evaluation(self.ordinal, sigma, progress, is_last, sigma - following[0], following)

    def _place(self, sigma: float) -> tuple[int, float]:
        """Index of the last grid sigma at or above `sigma`, and the sigma that counts: the nearest one of the grid if
        it is within the tolerance, so that steps smaller than the tolerance are told apart, too."""
        nearest = min(self.grid, key=lambda s: abs(s - sigma))
        here = nearest if abs(nearest - sigma) <= GRID_TOLERANCE * abs(sigma) else sigma
        return sum(s >= here for s in self.grid) - 1, here
