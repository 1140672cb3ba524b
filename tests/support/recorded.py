"""Full runs of a flow model with Euler whose outputs are given functions of sigma, as calibration records them."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastercache_core.calibration.losses import Reference
from fastercache_core.clock import Clock

COUNT, CFG = 16, 3.0
SIGMAS = [1.0 - i / COUNT for i in range(COUNT)]
SHAPE = (2, 4, 8, 8)


def fields(count: int, seed: int = 0) -> Tensor:
    """Independent noise, [count, *SHAPE]."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(cond: Callable[[float], Tensor], difference: Callable[[float], Tensor] | None = None) -> Reference:
    """The recorded run at SIGMAS; `difference` None for a run without a negative."""
    reference, clock, x = Reference(CFG), Clock([*SIGMAS, 0.0]), fields(1, 9)[0]
    for sigma in SIGMAS:
        evaluation = clock.tick(sigma)
        change = difference(sigma) if difference else None
        slope = cond(sigma) if change is None else cond(sigma) + (1 - CFG) * change
        reference.add(evaluation, -sigma, x, x - sigma * slope, cond(sigma), change)
        x = x - evaluation.step * slope
    return reference


def smooth_then_rough() -> Reference:
    """Outputs on a straight line, except for noise in the second half."""
    a, b = fields(2)
    noise = dict(zip(SIGMAS, fields(COUNT, 1)))
    return recorded(lambda s: a + b * s + (noise[s] if s < 0.5 else 0.0), lambda s: b * (1 - s))
