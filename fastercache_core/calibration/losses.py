"""What skipping costs: the error of every way to skip evaluations, from one recorded full run.

Predictions are weighted sums of computed values, so their errors follow from the inner products of these values alone,
without another network call. An error counts by what it does to the latent: the error of the slope times the step in
sigma, summed as vectors over evaluations that are skipped in a row, because those may cancel. What features of an
earlier evaluation give takes one pass of the network to know; where such outputs are recorded, REUSE, and MIX at the
lambda of least error, are compared like predictions.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..actions import COMPUTE, COSTS, Action, Step
from ..clock import Evaluation
from ..forecast import PRIOR, lagrange, spread, term_weights
from ..solvers import Solver
from .policy import DEPTH

# The most evaluations from one computed one to the next.
GAP = 6
# Weight of the ridge prior, the weights of a polynomial, relative to the energy of each value.
RIDGE = 1e-4
# Of the squared error of a gap: what the network makes of it where it is computed next, before that is taken back.
SEEN = 0.3
# Units of cost of COMPUTE where features may be reused: costs are rounded to one of them.
REUSE_UNITS = 20
# Lambda of MIX; beyond, it hardly differs from PREDICT or REUSE.
MIX_LIMITS = (0.05, 0.95)
# Elements of every tensor that are recorded, per picture and of a whole batch: inner products hardly need more.
PICTURE_ELEMENTS, BATCH_ELEMENTS = 2**18, 2**20
# Elements that are multiplied at once in float64: 256 MB.
CHUNK = 2**25

Keys = tuple[int, ...]  # ordinals of the last computed evaluations, newest first
T = TypeVar("T")


@dataclass
class Reference:
    """Full sampling of one batch, evaluation by evaluation.

    solver: what is known of the sampler. Lists with one entry an evaluation: sigma; step, the distance in sigma to the
    next; gain, by which an error of the output changes the slope of the latent; and tensors [batch, elements] (see
    `subsample`): x, the latent; slope, (x - denoised) / sigma; cond and difference (uncond - cond) in output space.
    reused: {(last computed, ordinal): guided output with its features}, empty where that was not measured; reuse_cost:
    what such a pass computes over what COMPUTE computes.
    """

    guidance_scale: float
    solver: Solver = Solver()
    sigmas: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)
    slope: list[Tensor] = field(default_factory=list)
    cond: list[Tensor] = field(default_factory=list)
    difference: list[Tensor] = field(default_factory=list)
    reused: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    reuse_cost: float = 1.0

    def add(
        self, evaluation: Evaluation, scale: float, x: Tensor, denoised: Tensor, cond: Tensor, difference: Tensor | None
    ) -> None:
        """Record a computed evaluation.

        scale: of denoised = skip + scale * output. x, denoised (guided), cond, difference: [batch, ...]; difference
        None without a negative.
        """
        self.sigmas.append(evaluation.sigma)
        self.steps.append(evaluation.step)
        self.gains.append(-scale / evaluation.sigma)
        self.x.append(subsample(x))
        self.slope.append(subsample((x - denoised) / evaluation.sigma))
        self.cond.append(subsample(cond))
        if difference is None:
            difference = torch.zeros_like(cond)
        self.difference.append(subsample(difference))

    def add_reused(self, key: int, ordinal: int, cond: Tensor, difference: Tensor | None) -> None:
        """Record what `ordinal` gives with the features of evaluation `key`; tensors as in `add`."""
        self.reused[key, ordinal] = self.guided(cond, difference)

    def guided(self, cond: Tensor, difference: Tensor | None) -> Tensor:
        """cond + (1 - guidance scale) * difference, both [batch, ...], subsampled: [batch, elements]."""
        guided = cond if difference is None else cond + (1 - self.guidance_scale) * difference
        return subsample(guided)

    def target(self, ordinal: int, x: Tensor, skip: Tensor, scale: float, strayed: Tensor | None = None) -> Tensor:
        """The guided output [batch, elements] at `ordinal` that leads the sampler from `x` back to the latent of this
        run. x, skip: [batch, ...] with denoised = skip + scale * output; strayed: how far the denoised latent of the
        evaluation before was from that of this run, [batch, elements]."""
        sigma, (weight, before) = self.sigmas[ordinal], self.step_weights(ordinal)
        drift = (subsample(x) - self.x[ordinal]) * ((sigma - self.steps[ordinal]) / sigma)
        if strayed is not None:
            drift = drift + before * strayed
        return (self.denoised(ordinal) - drift / weight - subsample(skip)) / scale

    def denoised(self, ordinal: int) -> Tensor:
        """The guided denoised latent [batch, elements] of an evaluation."""
        return self.x[ordinal] - self.slope[ordinal] * self.sigmas[ordinal]

    def step_weights(self, ordinal: int) -> tuple[float, float]:
        """See Solver.step_weights, of the step after an evaluation."""
        sigma, last = self.sigmas[ordinal], self.sigmas[ordinal - 1] if ordinal else None
        return self.solver.step_weights(last, sigma, sigma - self.steps[ordinal])

    @property
    def final(self) -> Tensor:
        """The denoised latent [batch, elements] of the last evaluation."""
        return self.denoised(-1)

    def products(self) -> np.ndarray:
        """Mean products [k, k] of all values: n conditional outputs, n guided differences, reused outputs."""
        count, elements = 2 * len(self.cond) + len(self.reused), self.cond[0].numel()
        total, width = torch.zeros(count, count, dtype=torch.float64), max(CHUNK // count, 1)
        for start in range(0, elements, width):
            values = torch.stack(list(self._values(slice(start, start + width)))).double()
            total += values @ values.T
        return (total / elements).numpy()

    def _values(self, part: slice) -> Iterator[Tensor]:
        """A part of all values, flat, in the order of `products`."""
        yield from (cond.flatten()[part] for cond in self.cond)
        yield from (difference.flatten()[part] * (1 - self.guidance_scale) for difference in self.difference)
        yield from (output.flatten()[part] for output in self.reused.values())


@dataclass(frozen=True)
class Choice:
    """One way to take some evaluations in a row: its loss, its cost in units and the action of each."""

    loss: float
    units: int
    actions: tuple[Action, ...]


class Losses:
    """What skipping between computed evaluations does to the latent, mean squared."""

    def __init__(self, reference: Reference, forecasts: Sequence[Action] = (Action.PREDICT,)) -> None:
        """forecasts: some of PREDICT and ESTIMATE. Where `reference` has outputs of reused features, REUSE and MIX are
        compared as well."""
        self.sigmas = reference.sigmas
        self.count = len(self.sigmas)
        self.products = reference.products()
        self.corrects = reference.solver.corrects
        steps = [reference.step_weights(m) for m in range(self.count)]
        own = zip(steps, self.sigmas, reference.gains, strict=True)
        self.effects = [weight * sigma * gain for (weight, _), sigma, gain in own]
        # What an error does in all, the next step included, over what it does in its own step.
        following = [*(before for _, before in steps[1:]), 0.0]
        self.echoes = [1 + before / (weight or 1.0) for (weight, _), before in zip(steps, following, strict=True)]
        self.forecasts = tuple(forecasts)
        self.reused = {pair: 2 * self.count + i for i, pair in enumerate(reference.reused)}
        self.costs = {action: COSTS[action] for action in forecasts}
        self.costs |= {Action.REUSE: reference.reuse_cost, Action.MIX: reference.reuse_cost}
        # The search counts whole units, and the fewer the faster.
        self.full_units = REUSE_UNITS if self.reused else 2 if Action.ESTIMATE in forecasts else 1
        self._ways: dict[tuple[Keys, int], dict[Action, tuple[np.ndarray, float]]] = {}

    def scaled(self, factors: Sequence[float]) -> Losses:
        """The same, where errors of each evaluation count `factors` times as much."""
        scaled = copy.copy(self)
        scaled.effects, scaled._ways = list(np.array(self.effects) * factors), {}
        return scaled

    def choices(self, keys: Keys, following: int) -> list[Choice]:
        """Ways to skip everything from keys[0] to `following`, for `search.search`; none where nothing may be.

        The loss is what is left once `following` has been computed and has corrected what it can.
        """
        ways = [self.ways(keys, m) for m in range(keys[0] + 1, following)]
        if not all(ways):
            return []
        errors = np.stack([error for way in ways for error, _ in way.values()])
        units = tuple((action, self._units(action)) for action in self.costs)
        picks, actions, costs = _patterns(tuple(tuple(way) for way in ways), units)
        places = [keys[0] + 1 + i for i, way in enumerate(ways) for _ in way]
        loss = self._losses(picks, errors, places, (following, *keys))
        choices = (Choice(float(loss[i]), costs[i], actions[i]) for i in np.lexsort((loss, np.array(costs))))
        return pareto(choices, lambda choice: choice.loss)

    def loss_of(self, keys: Keys, following: int, action: Action) -> float | None:
        """What is left where all from keys[0] to `following` take one action; None where one of them cannot."""
        places = list(range(keys[0] + 1, following))
        ways = [self.ways(keys, m) for m in places]
        if not all(action in way for way in ways):
            return None
        errors = np.stack([way[action][0] for way in ways])
        return float(self._losses(np.ones((1, len(places))), errors, places, (following, *keys))[0])

    def ways(self, keys: Keys, m: int) -> dict[Action, tuple[np.ndarray, float]]:
        """What may be done at `m` after `keys`: {action: (effect on the latent, as weights of all values; lambda)}."""
        if (keys, m) not in self._ways:
            ways = {action: (self._predict(keys, m, action), 1.0) for action in self.forecasts}
            if (keys[0], m) in self.reused:
                ways[Action.REUSE] = self._reuse(keys[0], m), 1.0
                if Action.PREDICT in ways:
                    ways |= self._mix(ways[Action.PREDICT][0], ways[Action.REUSE][0])
            self._ways[keys, m] = ways
        return self._ways[keys, m]

    def steps(self, actions: Iterable[Action]) -> tuple[Step, ...]:
        """The Steps of a policy for `actions`, one an evaluation."""
        steps: list[Step] = []
        keys: Keys = ()
        for m, action in enumerate(actions):
            if action is Action.COMPUTE:
                keys = (m, *keys)[:DEPTH]
                steps.append(COMPUTE)
            else:
                steps.append(Step(action, self.costs[action], self.ways(keys, m)[action][1]))
        return tuple(steps)

    def _losses(self, picks: np.ndarray, errors: np.ndarray, places: Sequence[int], known: Keys) -> np.ndarray:
        """Losses [ways] of the `errors` [errors, values] that each way picks [ways, errors].

        places: the evaluation of each error; known: the one that is computed after them, and those before.
        """
        following, echoes = known[0], np.array([self.echoes[m] for m in places])[:, None]
        total = picks @ (errors * echoes)
        if not (self.corrects and following < self.count):
            return self._energy(total)
        echoes[np.array(places) == following - 1] = 1.0  # the next step is still to come
        return self._energy(self._corrected(total, known)) + SEEN * self._energy(picks @ (errors * echoes))

    def _energy(self, errors: np.ndarray) -> np.ndarray:
        """Mean squares [ways] of errors [ways, values]."""
        return np.maximum(((errors @ self.products) * errors).sum(1), 0.0)

    def _corrected(self, errors: np.ndarray, known: Keys) -> np.ndarray:
        """`errors` [ways, values] without what weights of the `known` values take back."""
        rows, left = [*known, *(self.count + k for k in known)], errors.copy()
        left[:, rows] -= ridge(self.products[np.ix_(rows, rows)], self.products[rows] @ errors.T, [0.0]).T
        return left

    def _units(self, action: Action) -> int:
        return round(self.full_units * self.costs[action])

    def _predict(self, keys: Keys, m: int, action: Action) -> np.ndarray:
        """Effect of the error of PREDICT or ESTIMATE at `m`, true less predicted."""
        error, rows = self._true(m), [self.count + k for k in keys]
        prior = prior_weights([self.sigmas[k] for k in keys], self.sigmas[m])
        if action is Action.PREDICT:  # the conditional output is predicted as well
            rows, prior = [*keys, *rows], [*prior, *prior]
        else:
            error[m] = 0.0
        error[rows] -= ridge(self.products[np.ix_(rows, rows)], self.products[rows] @ error, prior)
        return error * self.effects[m]

    def _reuse(self, key: int, m: int) -> np.ndarray:
        error = self._true(m)
        error[self.reused[key, m]] = -1.0
        return error * self.effects[m]

    def _mix(self, predict: np.ndarray, reuse: np.ndarray) -> dict[Action, tuple[np.ndarray, float]]:
        """MIX at the lambda of least squared error, where it lies between PREDICT and REUSE."""
        apart = predict - reuse
        share = float(apart @ self.products @ predict / max(apart @ self.products @ apart, 1e-30))
        low, high = MIX_LIMITS
        return {Action.MIX: (predict - share * apart, share)} if low <= share <= high else {}

    def _true(self, m: int) -> np.ndarray:
        """The guided output at `m` as weights of all values."""
        true = np.zeros(len(self.products))
        true[[m, self.count + m]] = 1.0
        return true


def pareto(entries: Iterable[T], loss: Callable[[T], float]) -> list[T]:
    """Those of `entries` (cheapest first) whose loss is below that of every cheaper one."""
    front: list[T] = []
    for entry in entries:
        if not front or loss(entry) < loss(front[-1]):
            front.append(entry)
    return front


def fit(values: Sequence[Tensor], target: Tensor, nodes: Sequence[float], sigma: float) -> list[float]:
    """Weights of `values` (each [batch, elements]) that come nearest to `target`.

    nodes: sigmas of the values, newest first, each as often as there are bands; sigma: of the target. After all values
    of one signal come those of the other, if there is one.
    """
    stacked, flat = torch.stack(list(values)).flatten(1).double(), target.flatten().double()
    distinct = list(dict.fromkeys(nodes))
    weights = dict(zip(distinct, prior_weights(distinct, sigma), strict=True))
    prior = [weights[node] for node in nodes] * (len(stacked) // len(nodes))
    return ridge((stacked @ stacked.T).numpy() / len(flat), (stacked @ flat).numpy() / len(flat), prior).tolist()


def ridge(products: np.ndarray, against: np.ndarray, prior: Sequence[float]) -> np.ndarray:
    """Least-squares weights [k] or [k, cases] with a ridge `prior` [k]. products, against: [k, k], [k] or [k, cases],
    mean products."""
    pull = np.maximum(RIDGE * np.diag(products), 1e-30)
    return np.linalg.solve(products + np.diag(pull), (against.T + pull * np.asarray(prior)).T)


def prior_weights(nodes: Sequence[float], sigma: float) -> list[float]:
    """Weights of the values at `nodes`, newest first, in the polynomial through three that is the prior at `sigma`.

    Samplers with two calls a step visit a sigma twice: the older value there has no weight.
    """
    distinct = [i for i, node in enumerate(nodes) if node not in nodes[:i]]
    if len(distinct) < len(nodes):
        return spread(prior_weights([nodes[i] for i in distinct], sigma), distinct, len(nodes))
    if len(nodes) > 3:
        return [*prior_weights(nodes[:3], sigma), *[0.0] * (len(nodes) - 3)]
    if len(nodes) < 3:
        return lagrange(nodes, sigma)
    return (np.array([1.0, *PRIOR]) @ np.array(term_weights(nodes, sigma))).tolist()


def subsample(x: Tensor) -> Tensor:
    """The elements of `x` [batch, ...] that calibration looks at: [batch, elements] on the CPU, float32, a copy.

    At most PICTURE_ELEMENTS of a picture and BATCH_ELEMENTS of the whole batch, at the same places every time.
    """
    most = min(PICTURE_ELEMENTS, BATCH_ELEMENTS // len(x))
    x = x.flatten(1)
    if x.shape[1] > most:
        x = x[:, _places(x.shape[1], most).to(x.device)]
    return x.to("cpu", torch.float32, copy=True)


def overall_rms(x: Tensor) -> float:
    """Root mean square of everything."""
    return float(x.double().pow(2).mean().sqrt())


@lru_cache(maxsize=4)
def _places(size: int, count: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count]


@lru_cache(maxsize=4096)
def _patterns(
    allowed: tuple[tuple[Action, ...], ...], units: tuple[tuple[Action, int], ...]
) -> tuple[np.ndarray, list[tuple[Action, ...]], list[int]]:
    """Every way to give each evaluation one of its `allowed` actions: 0 or 1 [ways, actions of all], actions, units.

    units: of each action.
    """
    cost, ways = dict(units), list(itertools.product(*allowed))
    picks = [[float(action == way[i]) for i, some in enumerate(allowed) for action in some] for way in ways]
    return np.array(picks), ways, [sum(cost[action] for action in way) for way in ways]
