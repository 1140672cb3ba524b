"""Forecasts that learn during the run how a quantity moves."""
import pytest
import torch

from fastercache_core.bands import split
from fastercache_core.forecast import FORECASTS, History
from fastercache_core.measured import MeasuredHistory


def random_fields(count, batch=1):
    return torch.randn(count, batch, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fed(history, path, sigmas):
    for sigma in sigmas:
        history.push(sigma, (path(sigma),))
    return history


def error(history, path, sigma):
    return (history.at(sigma) - path(sigma)).norm().item()


SIGMAS = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65]


def test_a_smooth_quantity_is_followed_better_than_by_holding_it():
    a, b = random_fields(2)
    path = lambda s: a * s + b * s ** 2
    held, measured = fed(History(FORECASTS["hold"]), path, SIGMAS), fed(MeasuredHistory(), path, SIGMAS)
    assert error(measured, path, 0.6) < 0.1 * error(held, path, 0.6)


def test_where_the_past_says_nothing_the_forecast_falls_back_towards_holding():
    """Independent values: any extrapolation is worse than none, and the gains find that out."""
    values = dict(zip([*SIGMAS, 0.6], random_fields(9)))
    errors = {name: error(fed(history, values.get, SIGMAS), values.get, 0.6) for name, history in
              [("quadratic", History(FORECASTS["quadratic"])), ("measured", MeasuredHistory())]}
    assert errors["measured"] < 0.5 * errors["quadratic"]


def test_each_picture_of_a_batch_has_its_own_gains():
    smooth, rough = random_fields(2)[:, 0], random_fields(8)[:, 0]
    path = lambda s: torch.stack([smooth[0] * s, rough[SIGMAS.index(s)]])
    both = fed(MeasuredHistory(), path, SIGMAS)
    alone = fed(MeasuredHistory(), lambda s: path(s)[:1], SIGMAS)
    assert torch.allclose(both.at(0.6)[:1], alone.at(0.6))


def test_each_band_has_its_own_gains():
    smooth, rough = torch.ones(1, 1, 16, 16, dtype=torch.float64), random_fields(8)[:, :, :1]
    high = [r - split(r, (0.2,))[0] for r in rough]
    path = lambda s: split(smooth * s + high[SIGMAS.index(s)], (0.2,))
    history = MeasuredHistory()
    for sigma in SIGMAS:
        history.push(sigma, path(sigma))
    low = history.at(0.6, bands=(1.0, 0.0))
    assert torch.allclose(low, smooth * 0.6, atol=1e-6), "the rough band must not spoil the smooth one"


def test_bands_add_up_to_the_whole_and_latents_without_a_picture_are_one_band():
    x = random_fields(1)[0]
    assert torch.allclose(sum(split(x, (0.1, 0.3))), x)
    audio = torch.randn(1, 8, 100)
    assert torch.equal(split(audio, (0.2,))[0], audio)


def test_it_waits_for_three_values_and_forgets_when_told():
    history = MeasuredHistory()
    for sigma in SIGMAS[:2]:
        history.push(sigma, (torch.ones(1, 1, 4, 4),))
    assert not history.ready
    history.push(SIGMAS[2], (torch.ones(1, 1, 4, 4),))
    assert history.ready and history.at(0.5).mean().item() == pytest.approx(1.0)
    history.clear()
    assert not history.ready and history.tensors() == []
