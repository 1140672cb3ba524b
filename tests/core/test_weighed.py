"""The difference between branches, carried forward without swinging up."""
import math

import pytest
import torch

from fastercache_core.bands import split
from fastercache_core.forecast import FORECASTS, History
from fastercache_core.measured import MeasuredHistory
from fastercache_core.weighed import FADES, WeighedHistory

SIGMAS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
FIELD, OTHER = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fed(history, path, sigmas=SIGMAS):
    for sigma in sigmas:
        history.push(sigma, (path(sigma),))
    return history


def error(history, path, sigma):
    return (history.at(sigma) - path(sigma)).norm().item() / path(sigma).norm().item()


def astray(history, answer, gap, steps=60):
    """How far a run ends from the full one where a quantity answers to being astray, `answer` times as much.

    One value in `gap` is computed, the others are forecast; the latent moves by what was said.
    """
    off = torch.zeros_like(FIELD)
    for step in range(steps):
        sigma = 1 - step / steps
        full = FIELD * math.cos(3 * sigma) + OTHER * math.sin(5 * sigma)
        if step % gap and step > 1:
            said = history.at(sigma)
        else:
            said = full - answer * off
            history.push(sigma, (said,))
        off = off + (said - full) / steps
    return (off.norm() / FIELD.norm()).item()


def test_what_moves_evenly_is_followed_along_its_way():
    path = lambda s: FIELD * s + OTHER
    held = fed(History(FORECASTS["hold"]), path)
    assert error(fed(WeighedHistory(), path), path, 0.4) < 0.2 * error(held, path, 0.4)


@pytest.mark.parametrize("gap, answer", [(3, 60), (4, 40)])
def test_what_answers_to_its_own_errors_does_not_swing_up(gap, answer):
    """So does the difference between branches at a high cfg, and every polynomial breaks on it."""
    weighed, measured = astray(WeighedHistory(), answer, gap), astray(MeasuredHistory(), answer, gap)
    assert weighed < 0.1 < 1 < measured


@pytest.mark.parametrize("gap", [2, 3, 4])
def test_what_answers_little_is_followed_better_than_by_holding_it(gap):
    assert astray(WeighedHistory(), 5, gap) < 0.3 * astray(History(FORECASTS["hold"]), 5, gap)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_what_fades_is_taken_to_fade_on_by_half_as_much(share):
    history = fed(WeighedHistory(), lambda s: FIELD * share ** (10 * (1 - s)), SIGMAS[:2])
    assert torch.allclose(history.at(0.8), FIELD * share * share ** FADES)
    assert torch.allclose(history.at(0.85), FIELD * share * share ** (FADES / 2)), "by the way in sigma"


def test_what_grows_is_not_taken_to_grow_on():
    history = fed(WeighedHistory(), lambda s: FIELD * (2 - s), SIGMAS[:2])
    assert torch.allclose(history.at(0.8), FIELD * 1.1)


def test_before_anything_was_compared_the_only_value_is_held():
    assert torch.allclose(fed(WeighedHistory(), lambda s: FIELD, SIGMAS[:1]).at(0.5), FIELD)


def test_every_picture_of_a_batch_is_told_by_itself():
    smooth, rough = lambda s: FIELD * s, lambda s: OTHER * (-1) ** round(s * 10)
    both = fed(WeighedHistory(), lambda s: torch.cat([smooth(s), rough(s)]))
    for i, path in enumerate((smooth, rough)):
        assert torch.allclose(both.at(0.4)[i:i + 1], fed(WeighedHistory(), path).at(0.4))


def test_a_band_that_fades_leaves_the_others_alone():
    low, high = split(FIELD, (0.2,))
    history = WeighedHistory()
    for sigma, left in ((1.0, 1.0), (0.9, 0.25)):
        history.push(sigma, (low, high * left))
    assert torch.allclose(history.at(0.8), low + high * 0.25 * 0.25 ** FADES)


def test_a_sigma_seen_twice_and_empty_bands_do_no_harm():
    history = WeighedHistory()
    for sigma in (1.0, 1.0, 0.9, 0.9, 0.8):
        history.push(sigma, (FIELD, torch.zeros_like(FIELD)))
    assert torch.allclose(history.at(0.7), FIELD)


def test_a_new_start_forgets_what_was_seen():
    history = fed(WeighedHistory(), lambda s: FIELD * s)
    history.clear()
    history.push(1.0, (OTHER,))
    assert torch.equal(history.at(0.5), OTHER)
