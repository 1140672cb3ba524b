"""Auto-FR: keyframes found by gradient descent (FRDiff, arXiv 2312.03517, as in its released code).

Every evaluation has a gate, alpha = round(sigmoid(theta)), whose gradient is that of the sigmoid, and
theta is trained with Adam on

    error of the final latents + weight * sum(relu(2 sigmoid(theta) - 1))

Four departures. The error is the one that calibration foresees from a recorded run (`GapErrors`), so that
the network is not run and differentiated a hundred times: seconds, on any size of model. The weight of
the penalty grows from zero while training, so that gates close one after the other, the least needed
first. Theta starts from random values: from equal ones, and without the noise of changing batches, all
gates close at once. And of all gates tried on the way, with every weight, the best ones at each cost
are kept, not the last.
"""
from dataclasses import dataclass

import torch

from .calibration import DEPTH, GAP, rms
from .policy import Point

# Of the penalty at the end of training: from nearly everything computed to nearly nothing, for latents of size one.
WEIGHTS = tuple(10.0 ** (5 * k / 48 - 7) for k in range(49))


@dataclass(frozen=True)
class AutoFRSettings:
    """start, spread: mean and standard deviation of theta before training.

    The released code takes 100 iterations at a rate of 5e-3 from 0.1 without spread.
    """
    iterations: int = 600
    rate: float = 2e-2
    start: float = 1.0
    spread: float = 0.5


class GapErrors:
    """Foreseen squared error of the final latent, relative to its own, as a function of the gates.

    A sum over all gaps there may be: the loss of each times the gates that make it, which are those of the
    computed evaluations around and before it, and what is left of one for those skipped. With gates of 0 and
    1 that is the sum that exact search makes least, and its derivative by a gate is the difference that
    opening it makes.
    """

    def __init__(self, losses, size):
        """losses: calibration.Losses; the first of its forecasts is made. size: root mean square of the latent."""
        found = list(gaps(losses.count))
        self.loss = torch.tensor([losses.choices(*gap)[0].loss for gap in found], dtype=torch.float64) / size ** 2
        self.following = torch.tensor([following for _, following in found])
        nothing = losses.count * (GAP + 1)  # the place of a one in `links`
        places = [[key * (GAP + 1) + after - key - 1 for key, after in zip(keys, (following, *keys))]
                  for keys, following in found]
        self.places = torch.tensor([row + [nothing] * (DEPTH - len(row)) for row in places])

    def __call__(self, alpha):
        """Squared error [rows] for gates [rows, evaluations]."""
        known = links(alpha)
        too_long = known[:, :, GAP].sum(1)  # as bad as losing the picture
        known = torch.cat([known.flatten(1), torch.ones_like(alpha[:, :1])], 1)
        there = alpha[:, self.following]
        for place in self.places.T:
            there = there * known[:, place]
        return there @ self.loss + too_long


def find_points(reference, losses, settings=AutoFRSettings()):
    """The best policies met in training at each cost: a list of Point, cheapest first, without weights.

    reference: calibration.Reference; losses: calibration.Losses of it, whose first forecast is used.
    """
    size = rms(reference.x[-1] - reference.slope[-1] * reference.sigmas[-1])
    with torch.inference_mode(False), torch.enable_grad():  # the host runs its nodes without gradients
        found = train(GapErrors(losses, size), losses.count, settings)
    points = [Point(error, losses.steps(["FULL" if gate > 0.5 else losses.forecasts[0] for gate in alpha]))
              for error, alpha in found.values()]
    return _falling(points)


def train(errors, count, settings=AutoFRSettings()):
    """{number of open gates: (error, root mean square; gates, 0 or 1)}, the best that were tried.

    errors(gates [rows, count]) -> squared errors [rows].
    """
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    theta = torch.randn(len(weights), count - 2, generator=torch.Generator().manual_seed(0), dtype=weights.dtype)
    theta = (settings.start + settings.spread * theta).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=settings.rate)
    best = {}
    for iteration in range(settings.iterations):
        alpha = gates(theta)
        error = errors(alpha)
        for own, tried in zip(error.tolist(), alpha.tolist()):
            opened = round(sum(tried))
            if opened not in best or own < best[opened][0]:
                best[opened] = own, tried
        grown = (iteration / settings.iterations) ** 2 * weights
        loss = error + grown * torch.relu(2 * theta.sigmoid() - 1).sum(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return {opened: (max(own, 0.0) ** 0.5, tried) for opened, (own, tried) in best.items()}


def gates(theta):
    """Alpha [rows, n], 0 or 1, from `theta` [rows, n - 2]: both ends are always computed.

    The gradient passes the rounding as if it were not there.
    """
    soft = theta.sigmoid()
    ends = torch.ones_like(soft[:, :1])
    return torch.cat([ends, soft + (soft.round() - soft).detach(), ends], 1)


def gaps(count):
    """Every gap of a run: (ordinals of the last computed evaluations, newest first; that of the next one)."""
    for last in range(count):
        for following in range(last + 2, min(last + GAP, count - 1) + 1):
            yield from ((keys, following) for keys in _histories((last,)))


def links(alpha):
    """[rows, n, GAP + 1]: entry [i, k] is one where evaluation i is computed and the k after it are not."""
    closed = torch.cat([1 - alpha, alpha.new_zeros(len(alpha), GAP)], 1)
    found = [alpha]
    for k in range(1, GAP + 1):
        found.append(found[-1] * closed[:, k:k + alpha.shape[1]])
    return torch.stack(found, 2)


def _histories(keys):
    """`keys` with all that may have been computed before them, as far as a forecast looks back."""
    if len(keys) == DEPTH or keys[-1] == 0:
        return [keys]
    earlier = range(max(keys[-1] - GAP, 0), keys[-1])
    return [history for key in earlier for history in _histories((*keys, key))]


def _falling(points):
    """Those of `points` with less error than every cheaper one, cheapest first."""
    kept = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept
