"""What an evaluation does for a branch: the actions, from the one that runs most to the one that runs least."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(str, Enum):
    """What runs for one branch of one evaluation; the value is the word for it in reports and policies."""

    COMPUTE = "computed"  # the whole network; caches are refreshed
    MIX = "mixed"  # REUSE blended with what PREDICT would give
    REUSE = "reused"  # the network with features from the cache
    ESTIMATE = "estimated"  # nothing: from another branch of the same evaluation
    PREDICT = "predicted"  # nothing: from earlier evaluations

    @property
    def letter(self) -> str:
        """The letter that stands for it in one line: C, M, R, E or P."""
        return self.name[0]

    @property
    def reuses(self) -> bool:
        """True when it takes features from the cache."""
        return self in (Action.MIX, Action.REUSE)


# What a full evaluation of two branches is multiplied by; what MIX and REUSE cost depends on the features.
COSTS = {Action.COMPUTE: 1.0, Action.ESTIMATE: 0.5, Action.PREDICT: 0.0}


def fuller(action: Action, other: Action | None) -> Action:
    """Of two actions the one that runs more."""
    order = list(Action)
    return action if other is None or order.index(action) < order.index(other) else other


@dataclass(frozen=True)
class Step:
    """What one evaluation does.

    cost: what it computes over what COMPUTE computes; mix: lambda of MIX; cond, difference: weights of the last
    computed values, newest first, of each its bands, that predict the conditional output and uncond - cond, or, where
    these are computed, correct them. Empty: the run's own forecast, and no correction. reuses: what runs in ESTIMATE
    takes features from the cache.
    """

    action: Action
    cost: float = 0.0
    mix: float = 1.0
    cond: tuple[float, ...] = ()
    difference: tuple[float, ...] = ()
    reuses: bool = False

    @property
    def weighs(self) -> bool:
        """True when it brings its own weights."""
        return bool(self.cond or self.difference)


COMPUTE = Step(Action.COMPUTE, 1.0)
