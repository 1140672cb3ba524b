"""Auto-FR: keyframes found by gradient descent (FRDiff, arXiv 2312.03517, as in its released code).

Every evaluation has a gate, alpha = round(sigmoid(theta)), whose gradient is that of the sigmoid, and theta is trained
with Adam on

    error of the final latents + weight * sum(relu(2 sigmoid(theta) - 1))

What a closed gate does is what the first forecast does and, where reused features were recorded, features from the last
computed evaluation as in the paper; both are trained, and the better of both counts at every cost.

Four departures. The error is the one that calibration predicts from a recorded run (`GapErrors`), so that the network
is not run and differentiated a hundred times: seconds, on any size of model. The weight of the penalty grows from zero
while training, so that gates close one after the other, the least needed first. Theta starts from random values: from
equal ones, and without the noise of changing batches, all gates close at once. And the result is not the last gates,
but the best ones at each cost of all that occurred, with every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..actions import Action
from .losses import GAP, Keys, Losses, Reference, overall_rms, pareto
from .policy import DEPTH, Point, thinned

# Of the penalty at the end of training: from nearly everything computed to nearly nothing, for latents of size one.
WEIGHTS = tuple(10.0 ** (5 * k / 48 - 7) for k in range(49))


LOST = 1.0  # an error, relative to the latent, at which the picture is lost


@dataclass(frozen=True)
class GradientSettings:
    """start, spread: mean and standard deviation of theta before training.

    The released code takes 100 iterations at a rate of 5e-3 from 0.1 without spread.
    """

    iterations: int = 600
    rate: float = 2e-2
    start: float = 1.0
    spread: float = 0.5


DEFAULTS = GradientSettings()


class GapErrors:
    """Predicted squared error of the final latent, relative to its own, as a function of the gates.

    A sum over all gaps there may be: the loss of each times the gates that make it, which are those of the computed
    evaluations around and before it, and one minus those of the skipped ones. With gates of 0 and 1 that is the sum
    that exact search makes least, and its derivative by a gate is the difference that opening it makes.
    """

    def __init__(self, losses: Losses, size: float, skip: Action = Action.PREDICT) -> None:
        """skip: what evaluations with a closed gate do. size: root mean square of the latent."""
        every = list(gaps(losses.count))
        loss = [losses.loss_of(*gap, skip) for gap in every]
        lost = size**2  # where it cannot be done
        self.loss = torch.tensor([lost if own is None else own for own in loss], dtype=torch.float64) / size**2
        self.following = torch.tensor([following for _, following in every])
        one = losses.count * (GAP + 1)  # the place of a one in `runs`
        places = [
            [key * (GAP + 1) + after - key - 1 for after, key in pairwise((following, *keys))]
            for keys, following in every
        ]
        self.places = torch.tensor([row + [one] * (DEPTH - len(row)) for row in places])

    def __call__(self, alpha: Tensor) -> Tensor:
        """Squared error [rows] for gates [rows, evaluations]."""
        after = runs(alpha)
        too_long = after[:, :, GAP].sum(1)  # as bad as losing the picture
        after = torch.cat([after.flatten(1), torch.ones_like(alpha[:, :1])], 1)
        there = alpha[:, self.following]
        for place in self.places.T:
            there = there * after[:, place]
        return there @ self.loss + too_long


def find_points(reference: Reference, losses: Losses, settings: GradientSettings = DEFAULTS) -> list[Point]:
    """The best policies met in training at each cost, cheapest first, without weights.

    losses: of `reference`; their first forecast, or reused features, are what skipped evaluations do.
    """
    points: list[Point] = []
    for skip in (*losses.forecasts[:1], *([Action.REUSE] if losses.reused else [])):
        with torch.inference_mode(False), torch.enable_grad():  # the host runs its nodes without gradients
            best = train(GapErrors(losses, overall_rms(reference.final), skip), losses.count, settings)
        points += [
            Point(error, losses.steps(Action.COMPUTE if gate > 0.5 else skip for gate in alpha))
            for error, alpha in best.values()
            if error < LOST
        ]
    return thinned(pareto(sorted(points, key=lambda p: (p.cost, p.error)), lambda p: p.error))


def train(
    errors: Callable[[Tensor], Tensor], count: int, settings: GradientSettings = DEFAULTS
) -> dict[int, tuple[float, list[float]]]:
    """{number of open gates: (error, root mean square; gates, 0 or 1)}, the best that occurred.

    errors(gates [rows, count]) -> squared errors [rows].
    """
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    theta = torch.randn(len(weights), count - 2, generator=torch.Generator().manual_seed(0), dtype=weights.dtype)
    theta = (settings.start + settings.spread * theta).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=settings.rate)
    best: dict[int, tuple[float, list[float]]] = {}
    for iteration in range(settings.iterations):
        alpha = gates(theta)
        error = errors(alpha)
        for own, row in zip(error.tolist(), alpha.tolist(), strict=True):
            opened = round(sum(row))
            if opened not in best or own < best[opened][0]:
                best[opened] = own, row
        grown = (iteration / settings.iterations) ** 2 * weights
        loss = error + grown * torch.relu(2 * theta.sigmoid() - 1).sum(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return {opened: (max(own, 0.0) ** 0.5, row) for opened, (own, row) in best.items()}


def gates(theta: Tensor) -> Tensor:
    """Alpha [rows, n], 0 or 1, from `theta` [rows, n - 2]: both ends are always computed.

    The gradient passes the rounding as if it were not there.
    """
    soft = theta.sigmoid()
    ends = torch.ones_like(soft[:, :1])
    return torch.cat([ends, soft + (soft.round() - soft).detach(), ends], 1)


def gaps(count: int) -> Iterator[tuple[Keys, int]]:
    """Every gap of a run: (ordinals of the last computed evaluations, newest first; that of the next one)."""
    for last in range(count):
        for following in range(last + 2, min(last + GAP, count - 1) + 1):
            yield from ((keys, following) for keys in _histories((last,)))


def runs(alpha: Tensor) -> Tensor:
    """[rows, n, GAP + 1]: entry [i, k] is one where evaluation i is computed and the k after it are not."""
    closed = torch.cat([1 - alpha, alpha.new_zeros(len(alpha), GAP)], 1)
    lengths = [alpha]
    for k in range(1, GAP + 1):
        lengths.append(lengths[-1] * closed[:, k : k + alpha.shape[1]])
    return torch.stack(lengths, 2)


def _histories(keys: Keys) -> list[Keys]:
    """`keys` with all that may have been computed before them, as far as a prediction looks back."""
    if len(keys) == DEPTH or keys[-1] == 0:
        return [keys]
    earlier = range(max(keys[-1] - GAP, 0), keys[-1])
    return [history for key in earlier for history in _histories((*keys, key))]
