"""How far two pictures are apart: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture in a batch, tensor [batch].

    a, b: equal shapes [batch, ...]; peak: the largest possible value. Equal pictures: infinity.
    """
    error = (a.double() - b.double()).pow(2).flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / error)


def latent_psnr(a: Tensor, full: Tensor) -> Tensor:
    """PSNR in dB of each latent in a batch to that of full sampling, tensor [batch].

    a, full: [batch, ...]. The peak is four standard deviations of the full one, as it is in pictures from 0 to 1.
    """
    a, full = (value.double().flatten(1) for value in (a, full))
    peak = 4 * full.std(1, keepdim=True)
    return psnr(a / peak, full / peak)


def ssim(a: Tensor, b: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity of each picture in a batch, tensor [batch], 1.0 = equal.

    a, b: [batch, channels, height, width]. Gaussian window of 11 pixels (fewer for smaller pictures), sigma 1.5.
    Source: Wang et al. 2004, eq. 13.
    """
    window = _gaussian(min(11, min(a.shape[-2:]) // 2 * 2 - 1), a.shape[1])
    a, b = a.double(), b.double()
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    var_a = _blur(a * a, window) - mean_a**2
    var_b = _blur(b * b, window) - mean_b**2
    covariance = _blur(a * b, window) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(1)


def _gaussian(size: int, channels: int) -> Tensor:
    x = torch.arange(size, dtype=torch.float64) - size // 2
    g = torch.exp(-(x**2) / (2 * 1.5**2))
    g = g / g.sum()
    return (g[:, None] * g[None, :]).expand(channels, 1, size, size)


def _blur(x: Tensor, window: Tensor) -> Tensor:
    return F.conv2d(x, window.to(x.device), groups=x.shape[1])
