"""Auto-FR: keyframes found by gradient descent (FRDiff, arXiv 2312.03517, as in its released code).

Every evaluation has a gate, alpha = round(sigmoid(theta)), whose gradient is that of the sigmoid. What
is remembered is alpha * computed + (1 - alpha) * remembered, a skipped evaluation takes what is
remembered, and theta is trained on

    mean((x_ref - x)^2) + weight * sum(relu(2 sigmoid(theta) - 1)),     x: the final latents

Four departures. Outputs come from a recorded full run instead of a network that is run and
differentiated a hundred times: x is then a weighted sum of recorded outputs, and its distance from
x_ref follows from their inner products, in seconds and on any size of model. And two values are
remembered, so that a skipped evaluation is a line through them instead of a held value. Theta starts from
random values: from equal ones, and without the noise of changing batches, all gates close at once. And
of all gates tried on the way, with every weight, the best ones at each cost are kept, not the last.
"""
from dataclasses import dataclass

import torch

from .calibration import rms
from .policy import Point

# From nearly everything computed to nearly nothing, for latents of size one.
WEIGHTS = tuple(10.0 ** (k / 4 - 7) for k in range(25))


@dataclass(frozen=True)
class AutoFRSettings:
    """start, spread: mean and standard deviation of theta before training.

    The released code takes 100 iterations at a rate of 5e-3 from 0.1 without spread.
    """
    iterations: int = 300
    rate: float = 2e-2
    start: float = 0.1
    spread: float = 0.5


def find_points(reference, losses, settings=AutoFRSettings()):
    """The best policies met in training at each cost: a list of Point, cheapest first, without weights.

    reference: calibration.Reference; losses: calibration.Losses of it, whose first forecast is used.
    """
    size = rms(reference.x[-1] - reference.slope[-1] * reference.sigmas[-1])
    with torch.inference_mode(False), torch.enable_grad():  # the host runs its nodes without gradients
        products = torch.from_numpy(forecast_products(losses)) / size ** 2
        found = train(products, losses.sigmas, losses.effects, settings)
    points = [Point(error, losses.steps(["FULL" if gate > 0.5 else losses.forecasts[0] for gate in alpha]))
              for error, alpha in found.values()]
    return _falling(points)


def forecast_products(losses):
    """Inner products [n, n] of what the first forecast of `losses` stands in for: guided outputs, or differences."""
    n = losses.count
    cond, difference = slice(0, n), slice(n, 2 * n)
    parts = [cond, difference] if losses.forecasts[0] == "JUMP" else [difference]
    return sum(losses.products[a, b] for a in parts for b in parts)


def train(products, sigmas, effects, settings=AutoFRSettings()):
    """{number of open gates: (error left, root mean square; gates, 0 or 1)}, the best that were tried.

    products: tensor [n, n] of inner products of the outputs; sigmas, effects: n floats, effects turn an
    error of an output into one of the final latent.
    """
    weights = torch.tensor(WEIGHTS, dtype=products.dtype)
    theta = torch.randn(len(weights), len(sigmas) - 2, generator=torch.Generator().manual_seed(0), dtype=weights.dtype)
    theta = (settings.start + settings.spread * theta).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=settings.rate)
    best = {}
    for _ in range(settings.iterations):
        alpha = gates(theta)
        error = squared_error(alpha, products, sigmas, effects)
        for own, tried in zip(error.tolist(), alpha.tolist()):
            count = round(sum(tried))
            if count not in best or own < best[count][0]:
                best[count] = own, tried
        loss = error + weights * torch.relu(2 * theta.sigmoid() - 1).sum(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return {count: (max(own, 0.0) ** 0.5, tried) for count, (own, tried) in best.items()}


def gates(theta):
    """Alpha [weights, n], 0 or 1, from `theta` [weights, n - 2]: both ends are always computed.

    The gradient passes the rounding as if it were not there.
    """
    soft = theta.sigmoid()
    ends = torch.ones_like(soft[:, :1])
    return torch.cat([ends, soft + (soft.round() - soft).detach(), ends], 1)


def squared_error(alpha, products, sigmas, effects):
    """Mean squared distance [weights] of the final latents of gated from full sampling, by inner products."""
    own = torch.eye(len(sigmas), dtype=alpha.dtype)
    held = older = own[0].expand(len(alpha), -1)
    held_at = older_at = torch.full_like(alpha[:, :1], sigmas[0])
    total = torch.zeros_like(alpha)
    for m in range(1, len(sigmas)):
        gate = alpha[:, m:m + 1]
        apart = held_at - older_at
        ahead = torch.where(apart == 0, 0.0, (sigmas[m] - held_at) / torch.where(apart == 0, 1.0, apart))
        total = total + effects[m] * (1 - gate) * (held + ahead * (held - older) - own[m])
        older, older_at = blend(gate, held, older), blend(gate, held_at, older_at)
        held, held_at = blend(gate, own[m], held), blend(gate, sigmas[m], held_at)
    return ((total @ products) * total).sum(1)


def blend(alpha, computed, remembered):
    """alpha * computed + (1 - alpha) * remembered."""
    return alpha * computed + (1 - alpha) * remembered


def _falling(points):
    """Those of `points` with less error than every cheaper one, cheapest first."""
    kept = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept
