"""Frequency bands: which frequencies are in them, and that nothing is lost."""

import pytest
import torch

from fastercache_core.bands import disc, disc_radius, split

SIZES = [(60, 90), (64, 64), (45, 81), (61, 37), (33, 32), (4, 4)]


def test_the_low_band_of_a_constant_is_the_constant_and_of_the_finest_stripes_is_nothing() -> None:
    stripes = torch.ones(1, 1, 32, 32) * torch.tensor([1.0, -1.0]).repeat(16)
    assert torch.allclose(split(torch.full((1, 1, 32, 32), 3.0), (0.2,))[0], torch.tensor(3.0), atol=1e-6)
    assert split(stripes, (0.2,))[0].abs().max() < 1e-6


def test_radius_is_a_fraction_of_the_shorter_side_as_in_the_released_code() -> None:
    for height, width in SIZES:
        assert disc_radius(height, width, 0.2) == min(height, width) // 5


@pytest.mark.parametrize("height, width", SIZES)
def test_the_disc_is_that_around_the_centre_of_a_shifted_spectrum(height: int, width: int) -> None:
    radius = disc_radius(height, width, 0.2)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shifted = (x - width // 2) ** 2 + (y - height // 2) ** 2 <= radius**2
    assert torch.equal(torch.fft.fftshift(disc(height, width, radius)), shifted)


def test_bands_add_up_to_the_whole_and_latents_without_a_picture_are_one_band() -> None:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(sum(split(x, (0.1, 0.3))), x)
    audio = torch.randn(1, 8, 100)
    low, high = split(audio, (0.2,))
    assert torch.equal(low, audio) and not high.any()
    assert split(audio, ()) == (audio,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bands_have_the_dtype_of_the_latent_and_leave_it_alone(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 5, 12, 12).to(dtype)
    before = x.clone()
    bands = split(x, (0.2,))
    assert all(band.dtype == dtype and band.shape == x.shape for band in bands) and torch.equal(x, before)
    assert torch.allclose(sum(b.double() for b in bands), x.double(), atol=4 * torch.finfo(dtype).eps)
