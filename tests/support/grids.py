"""Sigmas of flow models, as the host's schedulers give them: noisiest first, 0 last."""

from __future__ import annotations

import numpy as np
import scipy.stats

TIMESTEPS = 1000


def even(steps: int) -> list[float]:
    """Evenly spaced from 1 to 0."""
    return [1 - i / steps for i in range(steps)] + [0.0]


def simple(steps: int, shift: float) -> list[float]:
    """`simple`: evenly spaced timesteps."""
    return [_shifted(TIMESTEPS - int(i * TIMESTEPS / steps), shift) for i in range(steps)] + [0.0]


def beta(steps: int, shift: float) -> list[float]:
    """`beta`: timesteps dense at both ends, each of them once."""
    quantiles = scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
    timesteps = dict.fromkeys(int(t) + 1 for t in np.rint(quantiles * (TIMESTEPS - 1)))
    return [_shifted(t, shift) for t in timesteps] + [0.0]


def linear_quadratic(steps: int) -> list[float]:
    """`linear_quadratic`: half of the steps on the first 2.5% of the way, for video."""
    linear, threshold = steps // 2, 0.025
    slope, rest = threshold / linear, linear - threshold * steps
    curve = rest / (linear * (steps - linear) ** 2)
    line = slope - 2 * rest / (steps - linear) ** 2
    noise = [i * slope for i in range(linear)]
    noise += [curve * i**2 + line * i + curve * linear**2 for i in range(linear, steps)]
    return [1 - n for n in noise] + [0.0]


def _shifted(timestep: int, shift: float) -> float:
    part = timestep / TIMESTEPS
    return shift * part / (1 + (shift - 1) * part)
