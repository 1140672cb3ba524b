"""CFG-Cache as the scripts do it, step by step: the released arithmetic on whole spectra beside ours on two bands."""

import numpy as np
import pytest
import torch

from fastercache_core.actions import Action
from fastercache_core.clock import Window
from fastercache_core.features.reuse import reuse_weight
from fastercache_core.published import PUBLISHED, RELEASED, published, published_guidance, row_for
from support.engine import Model, Sampling, error
from support.grids import even

# What each script does, in its own step numbers from 1 on: steps, the first skipped one, interval, last step of the
# low band, its factor, first step of the high band, its factor, what the shorter side is divided by.
SCRIPTS = {
    "CogVideoX": (50, 18, 5, 40, 1.1, 30, 1.1, 5),
    "Open-Sora": (30, 12, 5, 25, 1.15, 20, 1.15, 5),
    "Open-Sora-Plan": (150, 40, 6, 130, 1.1, 131, 1.2, 5),
    "Latte": (50, 18, 5, 44, 1.1, 45, 1.1, 5),
    "Mochi": (64, 23, 5, 51, 1.15, 31, 1.25, 5),
    "Vchitect": (100, 31, 5, 79, 1.05, 61, 1.1, 200),
}


def bands(x: torch.Tensor, divisor: int) -> tuple[np.ndarray, np.ndarray]:
    """Spectra [..., height, width] of the low and high band: a disc around the centre, as the scripts cut it."""
    height, width = x.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(x.double().numpy()), axes=(-2, -1))
    rows, columns = np.ogrid[:height, :width]
    low = (columns - width // 2) ** 2 + (rows - height // 2) ** 2 <= (min(height, width) // divisor) ** 2
    return spectrum * low, spectrum * ~low


def recovered(cond: torch.Tensor, low: np.ndarray, high: np.ndarray, divisor: int) -> torch.Tensor:
    own_low, own_high = bands(cond, divisor)
    whole = np.fft.ifftshift(low + own_low + high + own_high, axes=(-2, -1))
    return torch.from_numpy(np.fft.ifft2(whole).real)


@pytest.mark.parametrize("name", SCRIPTS)
def test_cfg_cache_of_every_script_is_exact(name: str) -> None:
    steps, first, every, low_last, low_factor, high_first, high_factor, divisor = SCRIPTS[name]
    model = Model(shape=(3, 15, 20), dtype=torch.float64)
    run = Sampling(model, sigmas=even(steps)).run(published_guidance(name, Window()))
    done = [outcome.action is Action.ESTIMATE for outcome in run.outcomes]
    assert done.index(True) + 1 == first and not done[-1]
    assert all(sum(done[i : i + every]) == every - 1 for i in range(first - 1, steps - every))
    low = high = None
    worst = 0.0
    for k, (outcome, sigma) in enumerate(zip(run.outcomes, even(steps)), start=1):
        velocities = [(x - y) / sigma for x, y in zip(run.latents[k - 1 : k] * 2, outcome.outputs)]
        if outcome.action is Action.COMPUTE:
            low, high = (u - c for u, c in zip(bands(velocities[1], divisor), bands(velocities[0], divisor)))
            continue
        low = low * low_factor if k <= low_last else low
        high = high * high_factor if k >= high_first else high
        expected = recovered(velocities[0], low, high, divisor)
        worst = max(worst, float((velocities[1] - expected).abs().max()))
    assert worst < 1e-5  # the released code works in 32 bits


def test_every_released_row_has_its_script() -> None:
    assert set(RELEASED) == {*SCRIPTS, "diffusers"}


def test_open_soras_w_is_that_of_its_script() -> None:
    """0.9 (k - 7) / 20 at its steps 8 to 30, from the first reuse on."""
    settings = published("Open-Sora", Window()).reuse
    assert settings is not None
    ours = [reuse_weight(settings, (k - 1) / 29, 7 / 29) for k in range(8, 31)]
    assert ours == pytest.approx([0.9 * (k - 7) / 20 for k in range(8, 31)], abs=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_row_runs_has_a_source_and_keeps_to_a_window(name: str) -> None:
    run = Sampling(sigmas=even(30)).run(published(name, Window()))
    assert PUBLISHED[name].source and (not PUBLISHED[name].guidance or error(run) < 0.2)
    inside = published(name, Window(0.4, 0.6))
    windows = [interval.window for interval in inside.reuse.intervals.values()] if inside.reuse else []
    assert all(0.4 <= w.start <= w.end and (w.end <= 0.6 or w.start == w.end) for w in windows)


def test_a_family_takes_its_own_row_and_others_the_papers() -> None:
    assert (row_for("Mochi"), row_for("CogVideoX"), row_for("Flux")) == ("Mochi", "CogVideoX", "paper")
