"""A sampler that counts as another one is watched: its latent must move as that sampler moves it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastercache_core.solvers import SOLVERS
from fastercache_core.walk import Stride, Walk
from support import grids
from support.samplers import SAMPLERS

KNOWN = [name for name, solver in SOLVERS.items() if solver.corrects]
SIGMAS = grids.simple(8, 3.0)


def watched(claimed: str, really: str, push: float = 0.0) -> list[bool]:
    """For every evaluation of a run: did the latent come where `claimed` says? push: added to it on the way."""
    walk, followed = Walk(SOLVERS[claimed], SIGMAS), []
    field = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor, sigma: float) -> Tensor:
        x = x + push * (len(followed) == 3)
        followed.append(walk.follows(x))
        denoised = torch.tanh(field * (1 + sigma)) + 0.1 * x
        walk.took(denoised)
        return denoised

    SAMPLERS[really](model, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), SIGMAS)
    return followed


@pytest.mark.parametrize("name", KNOWN)
def test_a_sampler_is_followed_through_a_whole_run(name: str) -> None:
    assert watched(name, name) == [True] * 8


@pytest.mark.parametrize("claimed", KNOWN)
@pytest.mark.parametrize("really", SAMPLERS)
def test_another_sampler_is_told_by_its_third_evaluation(claimed: str, really: str) -> None:
    alike = {claimed, really} <= {"sample_dpmpp_2m", "sample_res_multistep"}  # their weights differ by little
    assert claimed == really or alike or not all(watched(claimed, really)[:3])


def test_noise_that_is_added_on_the_way_is_seen_at_once() -> None:
    assert watched("sample_euler", "sample_euler", 0.1)[:4] == [True, True, True, False]


def test_more_evaluations_than_noise_levels_are_no_walk() -> None:
    walk, x = Walk(SOLVERS["sample_euler"], [1.0, 0.0]), torch.ones(1, 1, 2, 2)
    assert walk.follows(x)
    walk.took(x)
    assert not walk.follows(x)


def test_a_latent_that_jumps_is_told_from_one_that_takes_a_step() -> None:
    """A step as long as the slope says, one twice as long, and one to somewhere else."""
    stride, x = Stride(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoised = 0.1 * x
    assert not stride.strays(x, 1.0)
    stride.took(x, 1.0, denoised)
    step = (denoised - x) * 0.1
    assert not stride.strays(x + step, 0.9) and not stride.strays(x + 2 * step, 0.9)
    assert stride.strays(x.roll(3, -1), 0.9)
    assert not stride.strays(x, 1.0), "the same sigma once more"
    assert not stride.strays(x[:1], 0.9), "another latent"
