"""CFG-Cache: the linear form against the paper's literal recipe, its weights, its bookkeeping."""
import pytest
import torch

from fastercache_core.bands import disc_radius, split
from fastercache_core.clock import Evaluation, Window
from fastercache_core.guidance import GuidanceCache, GuidanceSettings, paper_weights
from fastercache_core.schedule import Interval

SIZES = [(60, 90), (64, 64), (45, 81), (61, 37), (33, 32), (4, 4)]
PERCENT_TO_SIGMA = lambda percent: 1.0 - percent  # a flow model without shift


def literal_recipe(cond, difference_low, difference_high, w_low, w_high, radius):
    """FasterCache eq. 6-11 word by word: transform, shift, mask, add, shift back, transform back."""
    mask = shifted_disc(*cond.shape[-2:], radius)
    spectrum = torch.fft.fftshift(torch.fft.fft2(cond), dim=(-2, -1))
    low, high = spectrum * mask, spectrum * ~mask
    total = (low + w_low * difference_low) + (high + w_high * difference_high)
    return torch.fft.ifft2(torch.fft.ifftshift(total, dim=(-2, -1))).real


def shifted_disc(height, width, radius):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (x - width // 2) ** 2 + (y - height // 2) ** 2 <= radius ** 2


def spectra_difference(cond, uncond, radius):
    mask = shifted_disc(*cond.shape[-2:], radius)
    difference = (torch.fft.fftshift(torch.fft.fft2(uncond), dim=(-2, -1))
                  - torch.fft.fftshift(torch.fft.fft2(cond), dim=(-2, -1)))
    return difference * mask, difference * ~mask


def at(ordinal, sigma, is_last=False):
    return Evaluation(ordinal, sigma, 0.0, is_last)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", SIZES)
def test_estimate_equals_the_papers_transform_mask_add_recipe(size, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    cond_then, uncond_then, cond_now = (torch.randn(2, 3, *size, generator=g, dtype=dtype) for _ in range(3))
    settings = GuidanceSettings(forecast="hold", weights="paper", switch=0.5)
    cache = GuidanceCache(settings, PERCENT_TO_SIGMA)
    cache.observe(at(0, 0.9), uncond_then - cond_then)
    ours = cache.estimate(at(1, 0.8), cond_now)

    spectra = spectra_difference(cond_then, uncond_then, disc_radius(*size, settings.radius))
    theirs = literal_recipe(cond_now, *spectra, 1.2, 1.0, disc_radius(*size, settings.radius))
    assert (ours - theirs).abs().max() < tolerance


def test_the_low_band_of_a_constant_is_the_constant_and_of_the_finest_stripes_is_nothing():
    stripes = torch.ones(1, 1, 32, 32) * torch.tensor([1.0, -1.0]).repeat(16)
    assert torch.allclose(split(torch.full((1, 1, 32, 32), 3.0), (0.2,))[0], torch.tensor(3.0), atol=1e-6)
    assert split(stripes, (0.2,))[0].abs().max() < 1e-6


def test_radius_is_a_fraction_of_the_shorter_side_as_in_the_released_code():
    for height, width in SIZES:
        assert disc_radius(height, width, 0.2) == min(height, width) // 5


def test_paper_raises_low_frequencies_before_the_switch_and_high_ones_after():
    assert paper_weights(True, 0.2, 0.3) == (1.2, 1.0)
    assert paper_weights(False, 0.2, 0.3) == (1.0, 1.3)


def test_released_weights_compound_per_skipped_evaluation_and_restart_after_a_full_one():
    settings = GuidanceSettings(Interval(5), "hold", "released", alpha_low=0.1, alpha_high=0.1,
                                low_window=Window(0, 0.5), high_window=Window(0.5, 1))
    cache = GuidanceCache(settings, PERCENT_TO_SIGMA)
    constant = torch.ones(1, 1, 8, 8)  # all of it is low frequency
    cache.observe(at(0, 0.9), constant)
    seen = [cache.estimate(at(i, 0.9 - 0.1 * i)).mean().item() for i in (1, 2, 3)]
    assert seen == pytest.approx([1.1, 1.21, 1.331], rel=1e-6)
    cache.observe(at(4, 0.6), constant)
    assert cache.estimate(at(5, 0.55)).mean().item() == pytest.approx(1.1, rel=1e-6)


@pytest.mark.parametrize("weights", ["none", "paper"])
def test_linear_forecast_is_exact_for_a_difference_that_moves_linearly_in_sigma(weights):
    slope, base = torch.randn(2, 1, 4, 16, 16, dtype=torch.float64)
    settings = GuidanceSettings(forecast="linear", weights=weights, alpha_low=0.0, alpha_high=0.0)
    cache = GuidanceCache(settings, PERCENT_TO_SIGMA)
    for ordinal, sigma in enumerate((0.9, 0.7)):  # uneven steps must not matter
        cache.observe(at(ordinal, sigma), base + slope * sigma)
    assert torch.allclose(cache.estimate(at(2, 0.65)), base + slope * 0.65)


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_any_number_of_bands_adds_up_to_the_whole_difference(bands):
    difference = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    cache = GuidanceCache(GuidanceSettings(forecast="measured", bands=bands), PERCENT_TO_SIGMA)
    for ordinal, sigma in enumerate((0.9, 0.8, 0.7, 0.6)):
        cache.observe(at(ordinal, sigma), difference)
    assert torch.allclose(cache.estimate(at(4, 0.5)), difference, atol=1e-5)


@pytest.mark.parametrize("forecast", ["linear", "measured"])
def test_a_packed_latent_is_forecast_as_the_same_numbers_in_one_band(forecast):
    """Newer hosts join video and audio in one tensor [batch, 1, numbers], which has no picture plane."""
    differences = torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    packed, plane = (GuidanceCache(GuidanceSettings(forecast=forecast, bands=bands), PERCENT_TO_SIGMA)
                     for bands in (2, 1))
    for ordinal, difference in enumerate(differences):
        packed.observe(at(ordinal, 0.9 - 0.1 * ordinal), difference.reshape(2, 1, -1))
        plane.observe(at(ordinal, 0.9 - 0.1 * ordinal), difference)
    found = packed.estimate(at(5, 0.4))
    assert found.shape == (2, 1, 256)
    torch.testing.assert_close(found.reshape(2, 4, 8, 8), plane.estimate(at(5, 0.4)))
    torch.testing.assert_close(sum(split(found, (0.2, 0.3))), found, rtol=0, atol=0)


def test_nothing_is_estimated_before_enough_differences_are_known_nor_at_the_last_evaluation():
    cache = GuidanceCache(GuidanceSettings(Interval(3), "linear"), PERCENT_TO_SIGMA)
    cache.observe(at(0, 0.9), torch.ones(1))
    assert not cache.may_estimate(at(1, 0.8))
    cache.observe(at(1, 0.8), torch.ones(1))
    assert cache.may_estimate(at(2, 0.7)) and cache.may_estimate(at(3, 0.6))
    assert not cache.may_estimate(at(4, 0.5)), "the interval is over"
    assert not cache.may_estimate(at(2, 0.7, is_last=True))


def test_caller_tensors_are_never_written():
    difference = torch.randn(1, 2, 8, 8)
    before = difference.clone()
    for forecast in ("hold", "linear"):
        for weights in ("none", "paper", "released"):
            cache = GuidanceCache(GuidanceSettings(Interval(5), forecast, weights), PERCENT_TO_SIGMA)
            cache.observe(at(0, 0.9), difference)
            cache.observe(at(1, 0.8), difference)
            cache.estimate(at(2, 0.7))
            cache.estimate(at(3, 0.6))
            assert torch.equal(difference, before)
