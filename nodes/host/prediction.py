"""Between the denoised latents that the host hands around and the network's own output space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...fastercache_core.signal import rms


class OutputSpace:
    """The affine map denoised = skip(x) + scale * output at one evaluation.

    It holds for every prediction type of the host (noise, velocity, flow, EDM, x0), so it is read off `model_sampling`
    instead of being written down per family.
    """

    def __init__(self, model_sampling: Any, sigma: Tensor, x: Tensor, parts: tuple[int, ...] = ()) -> None:
        """sigma: [batch]; x: [batch, ...], the sampler's latent; parts: as of `rms`."""
        self.model_sampling, self.sigma, self.x, self.parts = model_sampling, sigma, x, parts
        one = torch.ones((sigma.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        zero = torch.zeros_like(one)
        self.scale = model_sampling.calculate_denoised(sigma, one, zero)
        self.scale = self.scale - model_sampling.calculate_denoised(sigma, zero, zero)

    def output(self, denoised: Tensor) -> Tensor:
        """The network output behind `denoised`, same shape."""
        return (denoised - self.denoised(torch.zeros_like(denoised))) / self.scale

    def denoised(self, output: Tensor) -> Tensor:
        """The denoised latent of a network output, same shape."""
        return self.model_sampling.calculate_denoised(self.sigma, output, self.x)

    def unit(self, latent: Tensor) -> Tensor:
        """What turns an error of the output into one of the slope (x - denoised) / sigma, relative to `latent`.

        latent: [batch, ...], measured by its root mean square. Returns [batch], of a packed one [batch, parts].
        """
        size = rms(latent, self.parts)
        scale, sigma = (t.reshape(-1, *[1] * (size.ndim - 1)) for t in (self.scale.abs(), self.sigma))
        return scale / (sigma * size).clamp_min(1e-9)

    def add(self, denoised: Tensor, output: Tensor) -> Tensor:
        """A denoised latent moved by a difference in output space."""
        return torch.addcmul(denoised, self.scale.to(denoised.dtype), output.to(denoised.dtype))

    def difference(self, denoised: Tensor, reference: Tensor) -> Tensor:
        """Difference of two denoised latents of one evaluation, in output space."""
        return (denoised - reference) / self.scale


class SlopeSpace(OutputSpace):
    """The slope (x - denoised) / sigma in place of the network's output.

    What stays the same along a first-order deterministic step, for every prediction type: the noise for diffusion
    models, the velocity for flow models. FRDiff's held score is this (a network's own output turns with sigma where it
    predicts v).
    """

    def __init__(self, model_sampling: Any, sigma: Tensor, x: Tensor, parts: tuple[int, ...] = ()) -> None:
        """sigma: [batch]; x: [batch, ...], the sampler's latent; parts: as of `rms`."""
        self.model_sampling, self.sigma, self.x, self.parts = model_sampling, sigma, x, parts
        self.scale = -sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    def denoised(self, output: Tensor) -> Tensor:
        """The denoised latent of a slope, same shape."""
        return self.x + self.scale * output


class DenoisedSpace(OutputSpace):
    """The denoised latent itself in place of the network's output.

    Where a sampler adds noise the latent jumps from step to step, and noise or velocity with it; what is expected
    behind the noise does not.
    """

    def __init__(self, model_sampling: Any, sigma: Tensor, x: Tensor, parts: tuple[int, ...] = ()) -> None:
        """sigma: [batch]; x: [batch, ...], the sampler's latent; parts: as of `rms`."""
        self.model_sampling, self.sigma, self.x, self.parts = model_sampling, sigma, x, parts
        self.scale = torch.ones((sigma.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)

    def output(self, denoised: Tensor) -> Tensor:
        """The same."""
        return denoised

    def denoised(self, output: Tensor) -> Tensor:
        """The same."""
        return output
