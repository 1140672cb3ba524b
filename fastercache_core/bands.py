"""The low and high spatial frequencies of a tensor (the split of FasterCache, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def disc(height: int, width: int, radius: int, device: torch.device | None = None) -> Tensor:
    """Mask [height, width] of the frequencies within `radius` (index units) of the mean, unshifted.

    Same set as the disc around the centre of a shifted spectrum in the released code.
    """
    fy = torch.fft.fftfreq(height, d=1 / height, device=device)
    fx = torch.fft.fftfreq(width, d=1 / width, device=device)
    return fy[:, None] ** 2 + fx[None, :] ** 2 <= radius**2


def disc_radius(height: int, width: int, fraction: float) -> int:
    """Whole-number radius: `fraction` of the shorter side (released code: a fifth)."""
    return int(min(height, width) * fraction + 1e-9)


def split(x: Tensor, fractions: Sequence[float]) -> tuple[Tensor, ...]:
    """Bands of `x` [..., height, width], lowest first, that add up to `x`.

    Transformed in at least float32, returned in the dtype of `x`. Latents without a picture plane,
    [batch, channels, length], are one band. Source: FasterCache eq. 6-9.
    fractions: rising upper edges of all bands but the last, each a fraction of the shorter side.
    """
    if not fractions:
        return (x,)
    if x.ndim < 4:  # audio and packed latents have no picture plane
        return (x, *(torch.zeros_like(x) for _ in fractions))
    height, width = x.shape[-2:]
    spectrum = torch.fft.fft2(x if x.dtype == torch.float64 else x.float())
    bands, below = [], torch.zeros_like(x)
    for fraction in fractions:
        mask = disc(height, width, disc_radius(height, width, fraction), x.device)
        up_to_here = torch.fft.ifft2(spectrum * mask).real.to(x.dtype)
        bands.append(up_to_here - below)
        below = up_to_here
    return (*bands, x - below)
