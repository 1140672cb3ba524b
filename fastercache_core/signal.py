"""One quantity that is predicted at skipped evaluations: its forecaster, and the local error of its last forecast.

A run has one for the conditional output (the reduced NFE of FRDiff, arXiv 2312.03517, with a forecast in place of its
held score) and one for the difference of every other branch to it (CFG-Cache). Both live in the network's own output
space (noise or velocity), where differences change slowly; those of denoised latents move with sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .clock import Window
from .forecast import Forecaster, make_forecaster
from .paper_weights import PaperWeights

# Edge of the low band of the conditional output, a fraction of the shorter latent side.
RADIUS = 0.2


@dataclass(frozen=True)
class OutputSettings:
    """forecast: how the conditional output is predicted, one of `forecast.FORECASTERS`."""

    forecast: str = "fitted"

    def signal(self) -> Signal:
        """The signal of one run."""
        return Signal(make_forecaster(self.forecast, (RADIUS,)))


@dataclass(frozen=True)
class DifferenceSettings:
    """How CFG-Cache predicts the difference of a branch to the conditional one.

    forecast: one of `forecast.FORECASTERS`; weights: one of `paper_weights.WEIGHTS`; radius: upper edge of the lowest
    band as a fraction of the shorter latent side; bands: how many, with edges spread evenly from `radius` to 0.5 (the
    paper's weights know two); switch: t0 of eq. 11, as a fraction of sampling.
    """

    forecast: str = "fitted"
    weights: str = "none"
    radius: float = 0.2
    bands: int = 2
    alpha_low: float = 0.2
    alpha_high: float = 0.2
    switch: float = 0.6
    low_window: Window = Window(0.0, 0.8)
    high_window: Window = Window(0.6, 1.0)

    def signal(self, percent_to_sigma: Callable[[float], float]) -> Signal:
        """The signal of one branch of one run."""
        weighs = self.weights != "none"
        forecaster = make_forecaster(self.forecast, self.edges(), weighs)
        return Signal(forecaster, PaperWeights(self, percent_to_sigma) if weighs else None)

    def edges(self) -> tuple[float, ...]:
        """Upper edges of all bands but the last."""
        count = self.bands if self.weights == "none" else 2
        width = (0.5 - self.radius) / (count - 1) if count > 1 else 0.0
        return tuple(self.radius + width * i for i in range(count - 1))


class Signal:
    """One signal during one run of one region.

    error: of the forecast that the last computed value made unnecessary, relative to the latent, [batch]; None before
    there was one. error_nodes: sigmas of the values that it was made from, newest first; error_sigma: where.
    """

    error: Tensor | None
    error_nodes: tuple[float, ...]
    _largest: float | None

    def __init__(self, forecaster: Forecaster, band_weights: PaperWeights | None = None) -> None:
        self.forecaster, self.band_weights = forecaster, band_weights
        self.clear()

    @property
    def known(self) -> int:
        """How many values the next forecast is made from."""
        return len(self.forecaster.nodes)

    @property
    def ready(self) -> bool:
        """True when the forecaster has as many values as it uses."""
        return self.known == self.forecaster.depth

    def observe(self, sigma: float, value: Tensor, unit: Tensor | None = None, parts: Sequence[int] = ()) -> None:
        """Take the value [batch, ...] computed at `sigma`.

        unit: [batch] or [batch, parts], turns an error into a relative one; None when nobody asks for errors. parts: as
        of `rms`, of which each counts by itself.
        """
        if unit is not None and self.known:
            self.error = worst(rms(self.forecaster.predict(sigma) - value, parts) * unit)
            self.error_nodes, self.error_sigma = tuple(self.forecaster.nodes), sigma
            self._largest = None
        self.forecaster.observe(sigma, value)
        if self.band_weights:
            self.band_weights.computed()

    def predict(
        self, sigma: float, onto: Tensor | None = None, scale: Tensor | None = None, values: Sequence[float] = ()
    ) -> Tensor:
        """`onto` + `scale` * the forecast at a skipped evaluation at `sigma`, a new tensor; see Forecaster.predict."""
        bands = self.band_weights.skipped(sigma) if self.band_weights else None
        return self.forecaster.predict(sigma, onto, scale, bands, () if self.band_weights else values)

    def largest_error(self) -> float:
        """The error of the worst picture of a batch, infinite before a forecast from all its values was compared.

        Reads one element from the device, at a moment when the host has waited for it anyway.
        """
        if self.error is None or len(self.error_nodes) < self.forecaster.depth:
            return float("inf")
        if self._largest is None:
            self._largest = float(self.error.max())
        return self._largest

    def clear(self) -> None:
        """Forget everything."""
        self.forecaster.clear()
        self.error = None
        self.error_nodes = ()
        self.error_sigma = 0.0

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return self.forecaster.tensors()


def rms(x: Tensor, parts: Sequence[int] = ()) -> Tensor:
    """Root mean square of each picture of a batch, [batch], in float32 at least.

    parts: how many elements of the last axis belong to each of several latents that are packed into one, such as video
    and its sound; then [batch, parts].
    """
    if parts:
        return torch.stack([rms(part) for part in x.split([*parts], -1)], 1)
    x = x.float() if x.element_size() < 4 else x
    return x.flatten(1).pow(2).mean(1).sqrt()


def worst(error: Tensor) -> Tensor:
    """The error [batch] of each picture, where it has several parts [batch, parts] that of the worst."""
    return error if error.ndim == 1 else error.amax(1)
