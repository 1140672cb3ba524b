"""Calibration: what skipping costs, and which forecasts are best, from full runs of the user's own model.

A full run tells everything about forecasts without another network call: what was computed at
evaluation m is compared with what the values before it would have foretold. All forecasts are
weighted sums of computed values, so their errors follow from the inner products of those values
alone, one small matrix for a run. What counts is what an error does to the latent: error of its
slope times the step in sigma, summed over the evaluations skipped in a row, because those may cancel.

What features of an earlier evaluation would have given takes one pass of the network to know. Those
outputs are recorded as well if wanted, and then reuse (REUSE), and its blend with the forecast (MIX)
at the lambda of least error, are weighed like forecasts, by inner products.

Then the policy that was chosen is sampled once, and at every skipped evaluation the weights are
fitted anew (`Reference.target`): to what would bring the latent back to the one of full sampling.
"""
import itertools
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from .forecast import lagrange
from .measured import PRIOR, term_weights
from .policy import ACTIONS, FULL, Point, Step
from .search import Choice, falling, search

# Values a forecast is made from, and the most evaluations from one computed one to the next.
DEPTH, GAP = 3, 6
# How strongly fitted weights lean to those of a polynomial, relative to the energy of the values.
LEAN = 1e-3
# What a forecast computes over what FULL computes.
FORECAST_COSTS = {"JUMP": 0.0, "ESTIMATE": 0.5}
# Units of FULL where features may be reused: costs are rounded to one of them.
REUSE_UNITS = 20
# Lambda of MIX; beyond, it hardly differs from JUMP or REUSE.
MIX_LIMITS = (0.05, 0.95)
# Numbers kept of every picture: inner products hardly need more.
NUMBERS = 1 << 18


@dataclass
class Reference:
    """Full sampling of one batch, evaluation by evaluation.

    Lists with one entry an evaluation: sigma; step, the distance in sigma to the next; gain, by which an
    error of the output changes the slope of the latent; and tensors [batch, numbers] (see `take`): x,
    the latent; slope, (x - denoised) / sigma; cond and difference (uncond - cond) in output space.
    reused: {(last computed, ordinal): guided output with its features}, empty where that was not measured;
    reuse_cost: what such a pass computes over what FULL computes.
    """
    guidance_scale: float
    sigmas: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    gains: list = field(default_factory=list)
    x: list = field(default_factory=list)
    slope: list = field(default_factory=list)
    cond: list = field(default_factory=list)
    difference: list = field(default_factory=list)
    reused: dict = field(default_factory=dict)
    reuse_cost: float = 1.0

    def add(self, evaluation, scale, x, denoised, cond, difference):
        """Record a full evaluation.

        evaluation: sigma and step of clock.Evaluation are used. scale: float, of denoised = skip + scale *
        output. x, denoised (guided), cond, difference: [batch, ...]; difference None without a negative.
        """
        self.sigmas.append(evaluation.sigma)
        self.steps.append(evaluation.step)
        self.gains.append(-scale / evaluation.sigma)
        self.x.append(take(x))
        self.slope.append(take((x - denoised) / evaluation.sigma))
        self.cond.append(take(cond))
        self.difference.append(torch.zeros_like(self.cond[-1]) if difference is None else take(difference))

    def add_reused(self, key, ordinal, cond, difference):
        """Record what `ordinal` gives with the features of evaluation `key`; tensors as in `add`."""
        self.reused[key, ordinal] = self.guided(cond, difference)

    def guided(self, cond, difference):
        """cond + (1 - guidance scale) * difference, [batch, numbers], as taken; difference may be None."""
        return take(cond) if difference is None else take(cond + (1 - self.guidance_scale) * difference)

    def target(self, ordinal, x, skip, scale):
        """The guided output [batch, numbers] at `ordinal` that leads a first-order sampler from `x` back to
        the latent of this run. x, skip: [batch, ...] with denoised = skip + scale * output."""
        drift = (take(x) - self.x[ordinal]) / self.steps[ordinal]
        denoised = take(x) - self.sigmas[ordinal] * (self.slope[ordinal] + drift)
        return (denoised - take(skip)) / scale

    def products(self):
        """Mean products [k, k] of all values: n conditional outputs, n guided differences, reused outputs."""
        values = torch.stack([*self.cond, *(d * (1 - self.guidance_scale) for d in self.difference),
                              *self.reused.values()])
        values = values.flatten(1).double()
        return (values @ values.T / values.shape[1]).numpy()


class Losses:
    """What skipping between computed evaluations does to the latent, mean squared.

    Errors are summed as vectors, by inner products of the values of the run.
    """

    def __init__(self, reference, forecasts=("JUMP",)):
        """forecasts: some of FORECAST_COSTS. With outputs of reused features in `reference`, REUSE and MIX
        are weighed as well."""
        self.sigmas = reference.sigmas
        self.count = len(self.sigmas)
        self.products = reference.products()
        self.effects = [step * gain for step, gain in zip(reference.steps, reference.gains)]
        self.forecasts = forecasts
        self.reused = {pair: 2 * self.count + i for i, pair in enumerate(reference.reused)}
        self.costs = {name: FORECAST_COSTS[name] for name in forecasts}
        self.costs |= {"REUSE": reference.reuse_cost, "MIX": reference.reuse_cost}
        # The search counts whole units, and the fewer the faster.
        self.full_units = REUSE_UNITS if self.reused else 2 if "ESTIMATE" in forecasts else 1
        self.known = {}

    def choices(self, keys, following):
        """Ways to skip everything from keys[0] to `following`, for `search.search`; none where nothing may be done."""
        ways = [self.ways(keys, m) for m in range(keys[0] + 1, following)]
        if not all(ways):
            return []
        errors = np.stack([error for way in ways for error, _ in way.values()])
        picks, names, units = _patterns(tuple(tuple(way) for way in ways), tuple(self._units(n) for n in ACTIONS))
        loss = np.maximum(((picks @ (errors @ self.products @ errors.T)) * picks).sum(1), 0.0)
        return falling(Choice(float(loss[i]), int(units[i]), names[i]) for i in np.lexsort((loss, units)))

    def ways(self, keys, m):
        """What may be done at `m` after `keys`: {action: (effect on the latent, as weights of all values; lambda)}."""
        if (keys, m) not in self.known:
            found = {name: (self._forecast(keys, m, name), 1.0) for name in self.forecasts}
            if (keys[0], m) in self.reused:
                found["REUSE"] = self._reuse(keys[0], m), 1.0
                if "JUMP" in found:
                    found |= self._mix(found["JUMP"][0], found["REUSE"][0])
            self.known[keys, m] = found
        return self.known[keys, m]

    def steps(self, actions):
        """The Steps of a policy for `actions`, one an evaluation."""
        steps, keys = [], ()
        for m, action in enumerate(actions):
            if action == "FULL":
                keys = (m, *keys)[:DEPTH]
                steps.append(FULL)
            else:
                steps.append(Step(action, self.costs[action], self.ways(keys, m)[action][1]))
        return tuple(steps)

    def _units(self, action):
        return round(self.full_units * self.costs.get(action, 0.0))

    def _forecast(self, keys, m, name):
        """Error of the forecast at `m`, true less foreseen."""
        error, rows = self._true(m), [self.count + k for k in keys]
        prior = polynomial([self.sigmas[k] for k in keys], self.sigmas[m])
        if name == "JUMP":  # the conditional output is forecast as well
            rows, prior = [*keys, *rows], [*prior, *prior]
        else:
            error[m] = 0.0
        error[rows] -= solve(self.products[np.ix_(rows, rows)], self.products[rows] @ error, prior)
        return error * self.effects[m]

    def _reuse(self, key, m):
        error = self._true(m)
        error[self.reused[key, m]] = -1.0
        return error * self.effects[m]

    def _mix(self, jump, reuse):
        """MIX at the lambda of least squared error, where it lies between JUMP and REUSE."""
        apart = jump - reuse
        share = float(apart @ self.products @ jump / max(apart @ self.products @ apart, 1e-30))
        low, high = MIX_LIMITS
        return {"MIX": (jump - share * apart, share)} if low <= share <= high else {}

    def _true(self, m):
        """The guided output at `m` as weights of all values."""
        true = np.zeros(len(self.products))
        true[[m, self.count + m]] = 1.0
        return true


def find_points(reference, losses, objective="sum"):
    """The curve of cost and error by exact search: a list of Point, cheapest first, without weights.

    objective: see `search.search`.
    """
    curve = search(losses.count, losses.choices, losses.full_units, GAP, DEPTH, objective)
    size = rms(reference.x[-1] - reference.slope[-1] * reference.sigmas[-1])
    return [Point(c.loss ** 0.5 / size, losses.steps(c.actions)) for c in curve]


def fit(values, target, nodes, sigma):
    """Weights of `values` (list of [batch, numbers], one or two per node, newest first) that come nearest to
    `target`: a list of floats. nodes: their sigmas; sigma: where."""
    values, target = torch.stack(values).flatten(1).double(), target.flatten().double()
    prior = polynomial(nodes, sigma) * (len(values) // len(nodes))
    return solve((values @ values.T).numpy() / len(target), (values @ target).numpy() / len(target), prior).tolist()


def solve(products, against, prior):
    """Least-squares weights, pulled towards `prior`: arrays [k, k], [k], [k] -> [k]."""
    lean = LEAN * max(np.trace(products) / len(products), 1e-30)
    return np.linalg.solve(products + lean * np.eye(len(products)), against + lean * np.asarray(prior))


def polynomial(nodes, sigma):
    """Weights (list) of up to three values at `nodes`, newest first, in the forecast leaned to, at `sigma`."""
    if len(nodes) < 3:
        return lagrange(nodes, sigma)
    return (np.array([1.0, *PRIOR]) @ np.array(term_weights(nodes, sigma))).tolist()


def take(x):
    """The numbers of `x` [batch, ...] that calibration looks at: [batch, at most NUMBERS] on the CPU, float32."""
    x = x.flatten(1)
    if x.shape[1] > NUMBERS:
        x = x[:, _places(x.shape[1]).to(x.device)]
    return x.to("cpu", torch.float32, copy=True)


def rms(x):
    """Root mean square of everything, a float."""
    return float(x.double().pow(2).mean().sqrt())


@lru_cache(maxsize=4)
def _places(size):
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:NUMBERS]


@lru_cache(maxsize=4096)
def _patterns(allowed, units):
    """Every way to give each evaluation one of its `allowed` actions: 0 or 1 [ways, actions of all], names, units.

    allowed: a tuple of names for each evaluation; units: of each of ACTIONS.
    """
    names = list(itertools.product(*allowed))
    picks = np.array([[float(name == action) for action, some in zip(way, allowed) for name in some] for way in names])
    return picks, names, [sum(units[ACTIONS.index(name)] for name in way) for way in names]
