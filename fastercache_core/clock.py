"""Where a sampling run is: the evaluations it has made, told by ordinal and sigma."""
from dataclasses import dataclass

# Samplers of flow models start a hair below the first sigma; a sigma counts as on the grid within this.
GRID_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Window:
    """A part of sampling as fractions of it: 0.0 is the first step, 1.0 the end."""
    start: float = 0.0
    end: float = 1.0

    def sigmas(self, percent_to_sigma):
        """Return (highest, lowest) sigma of the window, by the model's own `percent_to_sigma`."""
        return float(percent_to_sigma(self.start)), float(percent_to_sigma(self.end))


@dataclass(frozen=True)
class Evaluation:
    """One call of the network by the sampler, for all branches.

    `progress` runs from 0 at the first step to 1 at the last step of this run; `step` is the
    distance in sigma to the next one.
    """
    ordinal: int
    sigma: float
    progress: float
    is_last: bool
    step: float = 0.0
    following: tuple = ()


class Clock:
    """Counts the evaluations of one run.

    Samplers call the network once, twice or more a step and at sigmas off the grid, so an
    evaluation is told by its ordinal and its sigma, never by a step number.
    """

    def __init__(self, sigmas):
        """`sigmas`: the floats handed to the sampler, noisiest first, the end of sampling last."""
        *self.grid, self.end = [float(s) for s in sigmas]
        self.ordinal = -1

    def tick(self, sigma):
        """Count one more evaluation at `sigma` and return it."""
        self.ordinal += 1
        index = max(sum(s >= sigma * (1 - GRID_TOLERANCE) for s in self.grid) - 1, 0)
        progress = index / max(len(self.grid) - 1, 1)
        is_last = sigma <= self.grid[-1] * (1 + GRID_TOLERANCE)
        following = tuple(s for s in [*self.grid, self.end] if s < sigma * (1 - GRID_TOLERANCE)) or (self.end,)
        return Evaluation(self.ordinal, sigma, progress, is_last, sigma - following[0], following)
