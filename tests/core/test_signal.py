"""One signal: the paper's estimate against its literal recipe, its weights, and the local error of forecasts."""

import pytest
import torch
from torch import Tensor

from fastercache_core.bands import disc_radius, split
from fastercache_core.clock import Window
from fastercache_core.forecast import FORECASTERS
from fastercache_core.paper_weights import WEIGHTS, paper_weights
from fastercache_core.signal import DifferenceSettings, OutputSettings, Signal, rms

SIZES = [(60, 90), (64, 64), (45, 81), (61, 37), (33, 32), (4, 4)]


def percent_to_sigma(percent: float) -> float:
    """Of a flow model without shift."""
    return 1.0 - percent


def difference(forecast: str = "fitted", weights: str = "none", **settings: float | Window) -> Signal:
    """The signal of one difference between branches."""
    return DifferenceSettings(forecast, weights, **settings).signal(percent_to_sigma)


def observed(signal: Signal, values: dict[float, Tensor]) -> Signal:
    for sigma, value in values.items():
        signal.observe(sigma, value)
    return signal


# The paper's recipe


def literal_recipe(cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float, radius: int) -> Tensor:
    """FasterCache eq. 6-11 word by word: transform, shift, mask, add, shift back, transform back."""
    mask = shifted_disc(*cond.shape[-2:], radius)
    spectrum = torch.fft.fftshift(torch.fft.fft2(cond), dim=(-2, -1))
    total = (spectrum * mask + w_low * low) + (spectrum * ~mask + w_high * high)
    return torch.fft.ifft2(torch.fft.ifftshift(total, dim=(-2, -1))).real


def shifted_disc(height: int, width: int, radius: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (x - width // 2) ** 2 + (y - height // 2) ** 2 <= radius**2


def spectra_difference(cond: Tensor, uncond: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    mask = shifted_disc(*cond.shape[-2:], radius)
    spectra = (torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) for x in (uncond, cond))
    change = next(spectra) - next(spectra)
    return change * mask, change * ~mask


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", SIZES)
def test_estimate_equals_the_papers_transform_mask_add_recipe(
    size: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    g = torch.Generator().manual_seed(0)
    cond_then, uncond_then, cond_now = (torch.randn(2, 3, *size, generator=g, dtype=dtype) for _ in range(3))
    radius = disc_radius(*size, 0.2)
    spectra = spectra_difference(cond_then, uncond_then, radius)
    for sigma, weights in ((0.8, (1.2, 1.0)), (0.3, (1.0, 1.2))):
        signal = observed(difference("hold", "paper", switch=0.5), {0.9: uncond_then - cond_then})
        ours = signal.predict(sigma, onto=cond_now)
        assert (ours - literal_recipe(cond_now, *spectra, *weights, radius)).abs().max() < tolerance


def test_paper_raises_low_frequencies_before_the_switch_and_high_ones_after() -> None:
    assert paper_weights(True, 0.2, 0.3) == (1.2, 1.0)
    assert paper_weights(False, 0.2, 0.3) == (1.0, 1.3)


def test_released_weights_compound_per_skipped_evaluation_and_restart_after_a_computed_one() -> None:
    windows = dict(low_window=Window(0, 0.5), high_window=Window(0.5, 1))
    signal = difference("hold", "released", alpha_low=0.1, alpha_high=0.1, **windows)
    constant = torch.ones(1, 1, 8, 8)  # all of it is low frequency
    signal.observe(0.9, constant)
    seen = [signal.predict(0.9 - 0.1 * i).mean().item() for i in (1, 2, 3)]
    assert seen == pytest.approx([1.1, 1.21, 1.331], rel=1e-6)
    signal.observe(0.6, constant)
    assert signal.predict(0.55).mean().item() == pytest.approx(1.1, rel=1e-6)
    assert signal.predict(0.45).mean().item() == pytest.approx(1.1, rel=1e-6), "outside the window of low frequencies"


@pytest.mark.parametrize("weights", ["none", "paper"])
def test_linear_forecast_is_exact_for_a_difference_that_moves_linearly_in_sigma(weights: str) -> None:
    slope, base = torch.randn(2, 1, 4, 16, 16, dtype=torch.float64)
    signal = difference("linear", weights, alpha_low=0.0, alpha_high=0.0)
    observed(signal, {sigma: base + slope * sigma for sigma in (0.9, 0.7)})  # uneven steps must not matter
    assert torch.allclose(signal.predict(0.65), base + slope * 0.65)


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_any_number_of_bands_adds_up_to_the_whole_difference(bands: int) -> None:
    value = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    signal = observed(difference(bands=bands), dict.fromkeys((0.9, 0.8, 0.7, 0.6), value))
    assert torch.allclose(signal.predict(0.5), value, atol=1e-5)


def test_bands_have_edges_spread_evenly_up_to_the_finest_and_the_papers_weights_know_two() -> None:
    assert DifferenceSettings(bands=4, radius=0.2).edges() == pytest.approx((0.2, 0.3, 0.4))
    assert DifferenceSettings(bands=1).edges() == ()
    assert DifferenceSettings(weights="paper", bands=5, radius=0.3).edges() == (0.3,)


@pytest.mark.parametrize("forecast", ["linear", "fitted", "hedged"])
def test_a_packed_latent_is_predicted_as_the_same_elements_in_one_band(forecast: str) -> None:
    """Newer hosts join video and audio in one tensor [batch, 1, elements], which has no picture plane."""
    differences = torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    packed, plane = difference(forecast, bands=2), difference(forecast, bands=1)
    for i, value in enumerate(differences):
        packed.observe(0.9 - 0.1 * i, value.reshape(2, 1, -1))
        plane.observe(0.9 - 0.1 * i, value)
    predicted = packed.predict(0.4)
    assert predicted.shape == (2, 1, 256)
    torch.testing.assert_close(predicted.reshape(2, 4, 8, 8), plane.predict(0.4))
    torch.testing.assert_close(sum(split(predicted, (0.2, 0.3))), predicted, rtol=0, atol=0)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("forecast", FORECASTERS)
def test_caller_tensors_are_never_written(forecast: str, weights: str) -> None:
    value = torch.randn(1, 2, 8, 8)
    before = value.clone()
    signal = difference(forecast, weights)
    for sigma in (0.9, 0.8, 0.7):
        signal.observe(sigma, value, torch.ones(1))
        signal.predict(sigma - 0.05, onto=value, scale=torch.full((1, 1, 1, 1), 2.0))
    assert torch.equal(value, before)


@pytest.mark.parametrize("weights", ["paper", "released"])
def test_band_weights_take_the_place_of_weights_of_values(weights: str) -> None:
    values = {0.9: torch.ones(1, 1, 8, 8), 0.8: torch.ones(1, 1, 8, 8)}
    given, own = (observed(difference("linear", weights), values) for _ in range(2))
    assert torch.equal(given.predict(0.7, values=(5.0,)), own.predict(0.7))


# Readiness


@pytest.mark.parametrize("name, depth", [("hold", 1), ("linear", 2), ("quadratic", 3), ("fitted", 3), ("hedged", 3)])
def test_it_is_ready_with_as_many_values_as_the_forecast_uses_and_not_after_a_clear(name: str, depth: int) -> None:
    signal, states = OutputSettings(name).signal(), []
    for i in range(depth):
        states.append(signal.ready)
        signal.observe(1 - 0.1 * i, torch.ones(1, 1, 4, 4))
    assert not any(states) and signal.ready and signal.known == depth
    signal.clear()
    assert not signal.ready and signal.known == 0 and signal.tensors() == [] and signal.error is None


# Local errors


def test_a_forecast_is_compared_as_soon_as_one_value_is_known() -> None:
    signal, one = OutputSettings().signal(), torch.ones(2, 1, 4, 4)
    signal.observe(1.0, one, torch.ones(2))
    assert signal.error is None
    signal.observe(0.9, 3 * one, torch.tensor([1.0, 0.5]))
    assert signal.error is not None and signal.error.tolist() == pytest.approx([2.0, 1.0]), "held, in the unit given"
    signal.observe(0.8, 5 * one, torch.ones(2))
    assert signal.error.tolist() == pytest.approx([0.0, 0.0], abs=1e-5), "a straight line"


def test_where_nobody_asks_for_errors_there_are_none() -> None:
    assert observed(OutputSettings().signal(), {s: torch.ones(1, 1, 4, 4) for s in (1.0, 0.9, 0.8)}).error is None


def test_the_largest_error_is_that_of_the_worst_picture_once_all_values_of_the_forecast_are_known() -> None:
    signal, one = OutputSettings("linear").signal(), torch.ones(2, 1, 4, 4)
    errors = []
    for sigma, value in ((1.0, one), (0.9, one), (0.8, torch.cat([one[:1], 4 * one[1:]]))):
        signal.observe(sigma, value, torch.tensor([1.0, 0.5]))
        errors.append(signal.largest_error())
    assert errors[:2] == [float("inf")] * 2 and errors[2] == pytest.approx(1.5)
    assert signal.error_nodes == (0.9, 1.0) and signal.error_sigma == 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_root_mean_squares_of_small_dtypes_do_not_overflow(dtype: torch.dtype) -> None:
    x = 1000 * torch.ones(2, 16, 60, 104)
    assert torch.allclose(rms(x.to(dtype)), rms(x), rtol=1e-2)
