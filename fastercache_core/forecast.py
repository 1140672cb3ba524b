"""How a quantity is carried forward in sigma, from its last computed values.

polynomial  through the last one, two or three values (hold, linear, quadratic), or a blend of these
weighed     by the weights of a policy, for every value and band
fitted      hold + g1 * (linear - hold) + g2 * (quadratic - linear), with gains fitted during the run
hedged      between the fitted polynomial and the last value, in inverse proportion to their errors

Everything stays on the device of the values; sums run in float32 at least, whatever dtype these have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .bands import split

# Ridge prior of the gains, which are the gains before anything was fitted: the blend that served best on smooth
# trajectories. Its weight is relative to the terms' own energy.
PRIOR, LEAN = (1.0, 2 / 3), 0.3
MEMORY = 0.5  # weight of earlier fits against the newest one
LIMITS = (0.0, 1.25)  # of a gain
# Keeps a fit well posed where there is nothing but a straight line; and divisions by zero out.
WELL_POSED, TINY = 1e-6, 1e-12
# A polynomial goes no further beyond the newest value than this many times its distance from the one before: features,
# whose forecasts are not corrected, and latents, whose gaps grow by one evaluation at a time (a hair beyond four, so
# that rounding does not decide on even grids).
REACH, REACH_LATENT = 2.0, 4.01
# Of the fading seen from one computed value to the next, a forecast takes on this part: what merely changed looks like
# fading, too. At least LEAST of a value is left where the next one is computed.
FADES, LEAST = 0.5, 1e-3
# Values that the weights of a policy see, and upper edges of their bands but the last (see `bands.split`).
KEPT, WEIGHED_EDGES = 8, (0.08, 0.2, 0.35)
BANDS = len(WEIGHED_EDGES) + 1


class Forecaster(Protocol):
    """Carries one quantity forward during one run of one region.

    in_bands: True when it follows frequency bands one by one; per_value: weights that each value takes; depth: how many
    values it uses; nodes: sigmas of the values it holds, newest first.
    """

    in_bands: ClassVar[bool]
    per_value: ClassVar[int]
    depth: int
    nodes: list[float]

    def observe(self, sigma: float, x: Tensor) -> None:
        """Take `x` [batch, ...] as the value computed at `sigma`."""

    def predict(
        self,
        sigma: float,
        onto: Tensor | None = None,
        scale: Tensor | None = None,
        bands: Sequence[float] | None = None,
        values: Sequence[float] = (),
    ) -> Tensor:
        """`onto` [batch, ...] + `scale` [batch, 1, ...] * the forecast at `sigma`, a new tensor.

        bands: a weight for each band; values: weights of the newest values, in place of the forecast's own.
        """

    def values(self) -> list[Tensor]:
        """The values [bands, batch, ...] at `nodes`."""

    def clear(self) -> None:
        """Forget everything."""

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""


class Polynomial:
    """A blend of interpolation polynomials in sigma through the last values, one product over all that is held."""

    in_bands: ClassVar[bool] = False
    per_value: ClassVar[int] = 1

    def __init__(self, orders: Mapping[int, float], edges: Sequence[float] = ()) -> None:
        """orders: {order: share}, shares summing to 1; edges: see `bands.split`, none for one band."""
        self.orders, self.edges = orders, tuple(edges)
        self.depth = self.kept = max(orders) + 1
        self.clear()

    def observe(self, sigma: float, x: Tensor) -> None:
        """See Forecaster."""
        self._push(sigma, torch.stack(split(x, self.edges)))

    def predict(
        self,
        sigma: float,
        onto: Tensor | None = None,
        scale: Tensor | None = None,
        bands: Sequence[float] | None = None,
        values: Sequence[float] = (),
    ) -> Tensor:
        """See Forecaster."""
        weights = self._given(values) if values else self._weights(sigma)
        if bands is not None:
            weights = weights * tensor_like(bands, self._sums)[:, None]
        return self._weighted(weights, onto, scale)

    def values(self) -> list[Tensor]:
        """See Forecaster."""
        return list(self._stack) if self.nodes else []

    def clear(self) -> None:
        """See Forecaster."""
        self.nodes: list[float] = []
        self._stack = torch.empty(0)  # [nodes, bands, batch, ...]

    def tensors(self) -> list[Tensor]:
        """See Forecaster."""
        return [self._stack] if self.nodes else []

    def _push(self, sigma: float, bands: Tensor) -> None:
        """Keep `bands` [bands, batch, ...] as computed at `sigma`."""
        held = self._others(sigma)[: self.kept - 1]
        self._stack = torch.cat([bands[None], self._stack[held]]) if held else bands[None]
        self.nodes = [sigma, *(self.nodes[i] for i in held)]

    def _others(self, sigma: float) -> list[int]:
        """Places of the values computed elsewhere than at `sigma`: a polynomial needs distinct nodes, and two-stage
        samplers visit a sigma twice."""
        return distinct_nodes(self.nodes, sigma)

    @property
    def _sums(self) -> Tensor:
        """A tensor of what sums are made in: the stack's dtype, or float32 where that is smaller."""
        small = self._stack.element_size() < 4
        return self._stack.new_empty(0, dtype=torch.float32) if small else self._stack

    def _weights(self, sigma: float) -> Tensor:
        """Weight of every value in the forecast at `sigma`, [1 or batch, bands, nodes]."""
        near = reachable(self.nodes, sigma, REACH_LATENT)
        weights = spread(polynomial_weights([self.nodes[i] for i in near], sigma, self.orders), near, len(self.nodes))
        return tensor_like(weights, self._sums).expand(1, self._stack.shape[1], -1)

    def _weighted(self, weights: Tensor, onto: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """`onto` + `scale` * what is held, summed with `weights` [1 or batch, bands, nodes]; see `predict`."""
        nodes, count, batch, *shape = self._stack.shape
        held = at_least_float32(self._stack.reshape(nodes * count, batch, -1).transpose(0, 1))
        weights = weights.mT.reshape(-1, 1, nodes * count).expand(batch, -1, -1)
        if scale is not None:
            weights = weights * scale.to(weights.dtype).reshape(-1, 1, 1)
        base = held.new_zeros(1, 1, 1) if onto is None else onto.to(held.dtype).reshape(batch, 1, -1)
        return torch.baddbmm(base, weights, held).reshape(batch, *shape).to(self._stack.dtype)

    def _given(self, values: Sequence[float]) -> Tensor:
        padded = [*values, *[0.0] * (len(self.nodes) - len(values))]
        return tensor_like(padded, self._sums).expand(1, self._stack.shape[1], -1)


class Weighed(Polynomial):
    """More values than a polynomial passes through, in bands, for weights that a policy brings."""

    in_bands: ClassVar[bool] = True
    per_value: ClassVar[int] = BANDS

    def __init__(self) -> None:
        super().__init__({2: 1.0}, WEIGHED_EDGES)
        self.kept = KEPT

    def _given(self, values: Sequence[float]) -> Tensor:
        given = tensor_like(values, self._sums).reshape(1, -1, BANDS).mT
        return torch.nn.functional.pad(given, (0, len(self.nodes) - given.shape[-1]))


@dataclass
class Fit:
    """Running normal equations of two terms, for every band and picture: tensors [bands, batch]."""

    a11: Tensor
    a12: Tensor
    a22: Tensor
    b1: Tensor
    b2: Tensor

    def __add__(self, newer: Fit) -> Fit:
        return Fit(*(MEMORY * old + new for old, new in zip(vars(self).values(), vars(newer).values(), strict=True)))

    def gains(self, prior: tuple[float, float] = PRIOR, lean: float = LEAN) -> Tensor:
        """Least-squares (1, g1, g2), pulled towards `prior` and clamped: [batch, bands, 3]."""
        a11, a22 = self.a11 * (1 + lean), self.a22 * (1 + lean) + WELL_POSED * self.a11
        b1, b2 = self.b1 + lean * prior[0] * self.a11, self.b2 + lean * prior[1] * self.a22
        determinant = (a11 * a22 - self.a12**2).clamp_min(1e-30)
        g1 = (b1 * a22 - b2 * self.a12) / determinant
        g2 = (b2 * a11 - b1 * self.a12) / determinant
        return torch.stack([torch.ones_like(g1), g1.clamp(*LIMITS), g2.clamp(*LIMITS)]).movedim(-1, 0).mT


class Fitted(Polynomial):
    """The polynomial whose linear and quadratic terms have gains.

    Whenever the true value is computed, the terms that would have predicted it are fitted to it by least squares, for
    each band and picture, so that no picture depends on its neighbours in the batch.
    """

    in_bands: ClassVar[bool] = True

    def __init__(self, edges: Sequence[float] = ()) -> None:
        super().__init__({2: 1.0}, edges)

    def observe(self, sigma: float, x: Tensor) -> None:
        """See Forecaster."""
        bands = torch.stack(split(x, self.edges))
        self._learn(sigma, bands)
        self._push(sigma, bands)

    def clear(self) -> None:
        """See Forecaster."""
        super().clear()
        self._fit: Fit | None = None
        self._gains: Tensor | None = None

    def _learn(self, sigma: float, bands: Tensor) -> None:
        """Fit the gains to `bands` [bands, batch, ...], computed at `sigma`."""
        if len(self._others(sigma)) < self.depth:
            return
        held, bands = at_least_float32(self._stack), at_least_float32(bands)
        terms = tensor_like(term_weights(self.nodes, sigma), held)
        _, first, second = torch.tensordot(terms, held, 1).flatten(3)
        fit = fit_terms((bands - held[0]).flatten(2), first, second)
        self._fit = fit if self._fit is None else self._fit + fit
        self._gains = self._fit.gains()  # once, not at every evaluation that is skipped

    def _weights(self, sigma: float) -> Tensor:
        near = reachable(self.nodes, sigma, REACH_LATENT)
        rows = term_weights([self.nodes[i] for i in near], sigma)
        terms = tensor_like([spread(row, near, len(self.nodes)) for row in rows], self._sums)
        if self._gains is None:
            return (tensor_like([1.0, *PRIOR][: len(terms)], self._sums) @ terms).expand(1, self._stack.shape[1], -1)
        return (self._gains if len(near) == self.depth else self._gains[..., : len(near)]) @ terms


class Hedged(Fitted):
    """Between the fitted polynomial and the last value, each with the less weight the larger its last error.

    For the difference between branches, which feeds back on itself: it is multiplied by cfg - 1 and moves the latent,
    and the network answers to that in the next difference. Continued along a polynomial over long gaps, or at a high
    cfg, it swings up from gap to gap; held, it does not. The last value fades as it was seen to fade.
    """

    def observe(self, sigma: float, x: Tensor) -> None:
        """See Forecaster."""
        bands = torch.stack(split(x, self.edges))
        if 0 in self._others(sigma):
            values = at_least_float32(bands)
            if len(self.nodes) > 1:
                self._weigh(sigma, values.sum(0))
            self._see_fading(sigma, values.flatten(2))
        self._learn(sigma, bands)
        self._push(sigma, bands)

    def clear(self) -> None:
        """See Forecaster."""
        super().clear()
        self._share: Tensor | None = None  # of the polynomial, [batch, 1, 1]
        self._left: Tensor | None = None  # of a value after `_span`, [batch, bands]
        self._span = 0.0

    def _weights(self, sigma: float) -> Tensor:
        fading = self._fading(sigma)
        return fading if self._share is None else torch.lerp(fading, super()._weights(sigma), self._share)

    def _fading(self, sigma: float) -> Tensor:
        """Weights of a forecast by the newest value alone, as `_weights`."""
        _, count, batch = self._stack.shape[:3]
        weights = self._sums.new_zeros(batch, count, len(self.nodes))
        # Not below 0, where sigma turns back: what faded does not grow again.
        ahead = max(FADES * (self.nodes[0] - sigma) / self._span, 0.0) if self._span else 0.0
        weights[..., 0] = 1.0 if self._left is None else self._left**ahead
        return weights

    def _see_fading(self, sigma: float, values: Tensor) -> None:
        """Measure how much of the newest value is left in `values` [bands, batch, elements], computed at `sigma`."""
        newest = at_least_float32(self._stack[0]).flatten(2)
        left = (values * newest).sum(-1) / newest.pow(2).sum(-1).clamp_min(TINY)
        self._left, self._span = left.clamp(LEAST, 1.0).mT, self.nodes[0] - sigma

    def _weigh(self, sigma: float, true: Tensor) -> None:
        """Compare both forecasts with `true` [batch, ...] for the polynomial's share."""
        fading, fitted = (self._wrong(weights, true) for weights in (self._fading(sigma), super()._weights(sigma)))
        self._share = (fading / (fading + fitted).clamp_min(TINY))[:, None, None]

    def _wrong(self, weights: Tensor, true: Tensor) -> Tensor:
        """Sum of squared errors of a forecast by `weights`, [batch]."""
        return (at_least_float32(self._weighted(weights)) - true).flatten(1).pow(2).sum(-1)


ORDERS = {"hold": {0: 1.0}, "linear": {1: 1.0}, "quadratic": {2: 1.0}, "blend": {1: 1 / 3, 2: 2 / 3}}
FORECASTERS = ("fitted", "hedged", *ORDERS)


def make_forecaster(name: str, edges: Sequence[float], weighs_bands: bool = False) -> Forecaster:
    """The forecaster `name`, one of FORECASTERS. weighs_bands: the caller gives the bands their own weights."""
    if name == "fitted":
        return Fitted(edges)
    if name == "weighed":
        return Weighed()
    if name == "hedged":
        return Hedged(edges)
    return Polynomial(ORDERS[name], edges if weighs_bands else ())


def lagrange(nodes: Sequence[float], sigma: float) -> list[float]:
    """Weights of the values at `nodes` in their interpolation polynomial at `sigma`."""
    weights = []
    for i, a in enumerate(nodes):
        weight = 1.0
        for j, b in enumerate(nodes):
            if j != i:
                weight *= (sigma - b) / (a - b)
        weights.append(weight)
    return weights


def polynomial_weights(nodes: Sequence[float], sigma: float, orders: Mapping[int, float]) -> list[float]:
    """Weight of each value at `nodes` (newest first) in the blend of `orders` ({order: share}) at `sigma`."""
    weights = [0.0] * len(nodes)
    for order, share in orders.items():
        for i, weight in enumerate(lagrange(nodes[: order + 1], sigma)):
            weights[i] += share * weight
    return weights


def term_weights(nodes: Sequence[float], sigma: float) -> list[list[float]]:
    """Weights of the values at `nodes` (newest first) in hold, linear - hold, quadratic - linear ... at `sigma`."""
    orders = [[*lagrange(nodes[:n], sigma), *[0.0] * (len(nodes) - n)] for n in range(1, len(nodes) + 1)]
    steps = [[b - a for a, b in zip(lower, higher, strict=True)] for lower, higher in pairwise(orders)]
    return [orders[0], *steps]


def fit_terms(change: Tensor, first: Tensor, second: Tensor) -> Fit:
    """The Fit of what changed to what two terms predicted, all [bands, batch, elements]."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1)

    return Fit(dot(first, first), dot(first, second), dot(second, second), dot(change, first), dot(change, second))


def reachable(sigmas: Sequence[float], sigma: float, reach: float = REACH) -> list[int]:
    """Places of the values, computed at `sigmas` (newest first), that a polynomial to `sigma` may pass through.

    Samplers with several evaluations a step visit sigmas twice, or two that lie very close together.
    """
    near, way = [0], abs(sigma - sigmas[0])
    for i, older in enumerate(sigmas[1:], 1):
        if abs(sigmas[near[-1]] - older) * reach >= max(way, 1e-6 * abs(older)):
            near.append(i)
    return near


def distinct_nodes(nodes: Sequence[float], sigma: float) -> list[int]:
    """Places of `nodes` that are not `sigma` itself."""
    return [i for i, node in enumerate(nodes) if abs(node - sigma) > 1e-6 * max(abs(sigma), 1e-6)]


def spread(weights: Sequence[float], places: Sequence[int], count: int) -> list[float]:
    """`weights` at `places` of `count`, zero elsewhere."""
    given = dict(zip(places, weights, strict=True))
    return [given.get(i, 0.0) for i in range(count)]


def tensor_like(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Floats as a tensor of the dtype and on the device of `like`, without waiting for that device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself, or in float32 where its dtype is smaller."""
    return x.float() if x.element_size() < 4 else x
