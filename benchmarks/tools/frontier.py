"""Arithmetic of error against cost: means with their uncertainty, and how far apart two frontiers are."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fastercache_core.calibration.losses import pareto

EQUAL = 100.0  # dB, in place of infinity

Points = Iterable[tuple[float, float]]  # (cost, dB)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean, half the width of its 95% interval and the least of `values`; the half width is 0 for one value."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), 1.96 * standard_error(values), float(values.min())


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of the mean, 0 for one value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def frontier(points: Points) -> list[tuple[float, float]]:
    """The points that no other one beats in both, by rising cost."""
    return pareto(sorted(points, key=lambda point: (point[0], -point[1])), lambda point: -point[1])


def area(ours: Points, control: Points) -> tuple[float, float]:
    """(area, width): dB times cost between two frontiers, over the costs that both of them span.

    The area is positive where ours lies above; (0, 0) where they do not overlap.
    """
    (x, y), (u, v) = (np.array(frontier(points), dtype=float).T for points in (ours, control))
    low, high = max(x[0], u[0]), min(x[-1], u[-1])
    if high <= low:
        return 0.0, 0.0
    costs = np.unique(np.concatenate([[low, high], *(c[(c > low) & (c < high)] for c in (x, u))]))
    return float(np.trapezoid(np.interp(costs, x, y) - np.interp(costs, u, v), costs)), float(high - low)


def at_cost(points: Points, cost: float) -> float | None:
    """dB of a frontier at `cost`, None beyond its ends."""
    costs, decibels = np.array(frontier(points), dtype=float).T
    return float(np.interp(cost, costs, decibels)) if costs[0] <= cost <= costs[-1] else None


def at_steps(error: Callable[[int], float], steps: float) -> float:
    """The error of plain sampling with a number of steps that need not be whole, interpolated in 1 / steps.

    Only the two neighbours are asked for; one where the number is whole.
    """
    low = math.floor(steps + 1e-6)
    if steps - low < 1e-6:
        return error(low)
    share = (1 / steps - 1 / low) / (1 / (low + 1) - 1 / low)
    return (1 - share) * error(low) + share * error(low + 1)


def psnr_of(error: float) -> float | None:
    """PSNR in dB of a root mean square error, None for no error."""
    return -20 * math.log10(error) if error else None
