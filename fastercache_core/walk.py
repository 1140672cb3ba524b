"""Whether a run's latent moves as a solver moves it: how a sampler that wraps a known one is told from another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .solvers import Solver

# A step may end so far from where the solver's would, as a share of its length.
TOLERANCE = 0.001
# A latent that moved so many times as far as the step is long was moved by something else.
TOO_FAR = 3.0


class Walk:
    """The steps of one run: from each sigma of a grid to the next, by the denoised latents that the sampler gets."""

    def __init__(self, solver: Solver, sigmas: Sequence[float]) -> None:
        """solver: one with known steps; sigmas: of the run, noisiest first, the end of sampling last."""
        self.solver, self.sigmas, self.steps = solver, sigmas, 0
        self.x: Tensor | None = None
        self.denoised: list[Tensor] = []  # newest first

    def follows(self, x: Tensor) -> bool:
        """True when the step to latent `x` [batch, ...] was the solver's. Reads one value from the device."""
        before, self.x = self.x, x.clone()
        if before is None or not self.denoised:
            return before is None
        if self.steps >= len(self.sigmas) - 1:
            return False
        expected = self._expected(before)
        return bool((expected - x).norm() <= TOLERANCE * (before - x).norm())

    def took(self, denoised: Tensor) -> None:
        """The evaluation gave the guided `denoised` [batch, ...]."""
        self.denoised = [denoised.clone(), *self.denoised[:1]]
        self.steps += 1

    def _expected(self, x: Tensor) -> Tensor:
        sigma, following = self.sigmas[self.steps - 1 : self.steps + 1]
        last = self.sigmas[self.steps - 2] if self.steps > 1 else None
        weights = self.solver.step_weights(last, sigma, following)
        moved = sum(w * d for w, d in zip(weights, self.denoised, strict=False))
        return following / sigma * x + moved


class Stride:
    """Whether a latent moves from one evaluation to the next about as far as the slope there says."""

    def __init__(self) -> None:
        self.before: tuple[Tensor, Tensor, float] | None = None  # latent, norm of its slope, sigma

    def strays(self, x: Tensor, sigma: float) -> bool:
        """True when the latent `x` [batch, ...] at `sigma` is too far from where it was. Reads one value from the
        device."""
        if self.before is None or self.before[0].shape != x.shape:
            return False
        before, slope, last = self.before
        return bool((x - before).norm() > TOO_FAR * abs(last - sigma) * slope + TOLERANCE * x.norm())

    def took(self, x: Tensor, sigma: float, denoised: Tensor) -> None:
        """The evaluation at latent `x` gave the guided `denoised`, both [batch, ...]."""
        self.before = (x.clone(), ((x - denoised) / max(sigma, 1e-9)).norm(), sigma)
