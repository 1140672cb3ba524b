"""A policy: the action of every evaluation, found by calibration, with the whole curve of error over cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..actions import COMPUTE, Action, Step
from ..clock import GRID_TOLERANCE

# Of one policy, and of all points of its curve together: what a file holds, and what loads in a second.
MAX_EVALUATIONS, MAX_POINTS, MAX_STEPS = 1000, 1000, 100_000
# A forecast without weights of its own is made from this many computed values.
DEPTH = 3


class PolicyError(ValueError):
    """A policy that cannot be used, and why, in one sentence."""


@dataclass(frozen=True)
class Point:
    """One point of the curve: a Step per evaluation, and the predicted error of the final latent, root mean square,
    relative to the latent's own."""

    error: float
    steps: tuple[Step, ...]

    @property
    def cost(self) -> float:
        """Network rows over those of full sampling."""
        return sum(step.cost for step in self.steps) / len(self.steps)

    def actions(self) -> str:
        """One letter an evaluation: C, R, M, E or P."""
        return "".join(step.action.letter for step in self.steps)


@dataclass(frozen=True)
class Setup:
    """What a policy was found for. model: a fingerprint; resolution: a class of sizes, as the caller names it."""

    model: str
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    shift: float | None = None
    resolution: str = ""


@dataclass(frozen=True)
class Policy:
    """setup: what it was found for. sigmas: one an evaluation. points: the curve, cheapest first; chosen: the index of
    the one that is followed."""

    setup: Setup
    sigmas: tuple[float, ...]
    points: tuple[Point, ...]
    chosen: int = 0

    @property
    def steps(self) -> tuple[Step, ...]:
        """The Step of every evaluation."""
        return self.points[self.chosen].steps

    @property
    def cost(self) -> float:
        """Network rows over those of full sampling."""
        return self.points[self.chosen].cost

    @property
    def error(self) -> float:
        """Predicted error of the final latent, relative."""
        return self.points[self.chosen].error

    def matches(self, fingerprint: str) -> bool:
        """True when the policy was found on the model with this fingerprint."""
        return self.setup.model == fingerprint

    def at(self, budget: float) -> Policy:
        """The same policy at the point of least error that costs at most `budget`, else at the cheapest."""
        affordable = [i for i, point in enumerate(self.points) if point.cost <= budget + 1e-9]
        return replace(self, chosen=min(affordable, key=lambda i: self.points[i].error) if affordable else 0)

    def without_weights(self) -> Policy:
        """The same actions, predicted by the run's own forecasts."""
        return replace(self, points=tuple(replace(p, steps=_unweighted(p.steps)) for p in self.points))

    def for_sigmas(self, sigmas: Sequence[float]) -> Policy | None:
        """The policy for a run at `sigmas`, one an evaluation, at about the same cost; None where it does not fit.

        The density of computed evaluations over log sigma stays, the first and the last one are computed, the others
        do what the nearest one did. Weights belong to the sigmas that they were fitted at and are dropped. It fits
        1 to MAX_EVALUATIONS evaluations, all at sigmas above 0.
        """
        if not 0 < len(sigmas) <= MAX_EVALUATIONS or min(sigmas) <= 0:
            return None
        if len(sigmas) == len(self.sigmas) and np.allclose(sigmas, self.sigmas, rtol=GRID_TOLERANCE):
            return self
        grids = _Grids(self.sigmas, sigmas)
        points = tuple(sorted((grids.resample(p) for p in self.points), key=lambda p: p.cost))
        chosen = min(range(len(points)), key=lambda i: abs(points[i].cost - self.cost))
        return Policy(replace(self.setup, steps=len(sigmas)), tuple(sigmas), points, chosen)


class _Grids:
    """Moves points from the sigmas `old` to the sigmas `new`."""

    def __init__(self, old: Sequence[float], new: Sequence[float]) -> None:
        self.old, self.logs = old, np.array([math.log(sigma) for sigma in new])
        self.distances = np.array([[abs(math.log(a / b)) for a in old] for b in new])

    def resample(self, point: Point) -> Point:
        """The point on the new sigmas, without weights."""
        computed = self._spread(
            [s for s, step in zip(self.old, point.steps, strict=True) if step.action is Action.COMPUTE]
        )
        if any(step.action is Action.PREDICT for step in point.steps):
            computed |= set(range(min(DEPTH, len(self.logs))))
        rest = [i for i, step in enumerate(point.steps) if step.action is not Action.COMPUTE]
        if not rest:
            return Point(point.error, (COMPUTE,) * len(self.logs))
        nearest = self.distances[:, rest].argmin(1)
        steps = (COMPUTE if i in computed else point.steps[rest[near]] for i, near in enumerate(nearest))
        return Point(point.error, _unweighted(steps))

    def _spread(self, keys: Sequence[float]) -> set[int]:
        """Ordinals of the new sigmas to compute: as the old ones `keys` lie, in proportion."""
        count = len(self.logs)
        wanted = min(max(round(len(keys) * count / len(self.old)), 2), count)
        places = np.interp(np.linspace(0, len(keys) - 1, wanted), range(len(keys)), np.log(keys))
        chosen = [0]
        for k, place in enumerate(places[1:-1], start=1):
            free = self.logs[chosen[-1] + 1 : count - wanted + k + 1]
            chosen.append(chosen[-1] + 1 + int(abs(free - place).argmin()))
        return {*chosen, count - 1}


def thinned(points: Sequence[Point]) -> list[Point]:
    """As many of `points` (a curve, cheapest first) as a policy holds, evenly spread, both ends among them."""
    most = min(MAX_POINTS, MAX_STEPS // len(points[0].steps))
    if len(points) <= most:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, most).round().astype(int)]


def _unweighted(steps: Iterable[Step]) -> tuple[Step, ...]:
    return tuple(replace(step, cond=(), difference=()) if step.cond or step.difference else step for step in steps)
