"""Where a sampling run is: the evaluations it has made, by ordinal and sigma, and windows of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Samplers of flow models start a hair below the first sigma; a sigma counts as on the grid within this.
GRID_TOLERANCE = 1e-3
# Where the grid is not known, an evaluation is taken for the last one if its sigma is no more than so many steps.
LAST_STEPS, MOST_STEPS = 3, 1000
# A step that takes away this share of the noise ends a run: schedulers such as `normal` go on to a last one of next to
# nothing.
ENDS = 0.75


def knows_grid(sigmas: Sequence[float]) -> bool:
    """True when `sigmas`, as handed to a sampler, say where it evaluates: some samplers get one, or [0, 0], instead."""
    return len(sigmas) > 1 and max(sigmas[:-1]) > 0


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

    @property
    def ends(self) -> bool:
        """True when what the sampler gets is all but the result: an error would reach that undamped."""
        return self.is_last or self.step >= ENDS * self.sigma


class Clock:
    """Counts the evaluations of one run.

    Samplers call the network once, twice or more a step and at sigmas off the grid, so an evaluation is known by its
    ordinal and its sigma, never by a step number.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        """sigmas: as handed to the sampler, noisiest first, the end of sampling last; see `knows_grid`."""
        *self.grid, self.end = [float(s) for s in sigmas] if knows_grid(sigmas) else [0.0]
        self.ordinal = -1
        self._before: float | None = None
        self._step = 0.0

    def tick(self, sigma: float) -> Evaluation:
        """Count one more evaluation at `sigma` and return it."""
        self.ordinal += 1
        if not self.grid:
            return self._tick_without_grid(sigma)
        index, here = self._place(sigma)
        progress = max(index, 0) / max(len(self.grid) - 1, 1)
        is_last = here <= self.grid[-1]
        following = tuple(s for s in [*self.grid, self.end] if s < here) or (self.end,)
        return Evaluation(self.ordinal, sigma, progress, is_last, sigma - following[0], following)

    def _tick_without_grid(self, sigma: float) -> Evaluation:
        """All steps to come are taken to be as long as the last one, and `sigma` to be the last where few are left."""
        before = sigma if self._before is None else self._before
        self._before, self._step = sigma, before - sigma if before > sigma else self._step
        left = min(int(sigma / self._step), MOST_STEPS) if self._step > 0 else 0
        following = (*(sigma - i * self._step for i in range(1, left)), self.end)
        return Evaluation(self.ordinal, sigma, 0.0, left <= LAST_STEPS, sigma - following[0], following)

    def _place(self, sigma: float) -> tuple[int, float]:
        """Index of the last grid sigma at or above `sigma`, and the sigma that counts: the nearest one of the grid if
        it is within the tolerance, so that steps smaller than the tolerance are told apart, too."""
        nearest = min(self.grid, key=lambda s: abs(s - sigma))
        here = nearest if abs(nearest - sigma) <= GRID_TOLERANCE * abs(sigma) else sigma
        return sum(s >= here for s in self.grid) - 1, here
