"""Which action an evaluation takes for a branch, and when a fixed-interval method may skip."""
from dataclasses import dataclass, field
from enum import Enum

from .clock import Window


class Action(str, Enum):
    """What runs for one branch of one evaluation."""
    FULL = "FULL"          # the whole network; caches are refreshed
    REUSE = "REUSE"        # the network with features from the cache
    MIX = "MIX"            # REUSE blended with what JUMP would give
    ESTIMATE = "ESTIMATE"  # nothing: computed from another branch of the same evaluation
    JUMP = "JUMP"          # nothing: forecast from earlier evaluations


@dataclass(frozen=True)
class Interval:
    """Compute one evaluation in `every`, skip the others, inside a window of sampling."""
    every: int = 2
    window: Window = field(default_factory=Window)


class IntervalSchedule:
    """An `Interval` during one run: remembers when its quantity was last computed.

    The evaluation that ends a run is never skipped: its error would reach the result undamped.
    """

    def __init__(self, interval, percent_to_sigma):
        self.every = interval.every
        self.high, self.low = interval.window.sigmas(percent_to_sigma)
        self.computed_at = None

    def may_skip(self, evaluation):
        """True when the interval allows `evaluation` to be skipped."""
        if self.computed_at is None or evaluation.is_last or not self.inside(evaluation):
            return False
        return evaluation.ordinal - self.computed_at < self.every

    def inside(self, evaluation):
        """True when `evaluation` lies in the interval's window."""
        return self.low <= evaluation.sigma <= self.high

    def computed(self, evaluation):
        """Note that the quantity was computed at `evaluation`."""
        self.computed_at = evaluation.ordinal

    def reset(self):
        """Forget the past, so that the next evaluation is computed."""
        self.computed_at = None
