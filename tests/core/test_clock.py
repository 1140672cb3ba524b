"""Evaluations are known by ordinal and sigma, on grids of any density; windows are parts of sampling."""

import math
from itertools import pairwise

import pytest

from fastercache_core.clock import Clock, Evaluation, Window
from support import grids

GRID = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
DENSE = {
    "linear_quadratic, 100 steps": grids.linear_quadratic(100),
    "beta, shift 8, 30 steps": grids.beta(30, 8.0),
    "beta, shift 12, 50 steps": grids.beta(50, 12.0),
    "simple, shift 12, 50 steps": grids.simple(50, 12.0),
    "simple, shift 12, 100 steps": grids.simple(100, 12.0),
    "steps of a millionth": [1 - i * 1e-6 for i in range(9)] + [0.0],
}


def evaluations(grid: list[float], sigmas: list[float]) -> list[Evaluation]:
    clock = Clock(grid)
    return [clock.tick(sigma) for sigma in sigmas]


def test_progress_counts_steps_not_calls_and_tolerates_a_shifted_first_sigma() -> None:
    progress = [e.progress for e in evaluations(GRID, [0.9999, 0.9, 0.8, 0.7, 0.2])]
    assert progress == pytest.approx([0.0, 0.0, 0.25, 0.25, 1.0])


def test_ordinals_count_calls_and_sigmas_are_those_of_the_sampler() -> None:
    seen = evaluations(GRID, [0.9999, 0.8, 0.8, 0.6])
    assert [e.ordinal for e in seen] == [0, 1, 2, 3] and [e.sigma for e in seen] == [0.9999, 0.8, 0.8, 0.6]


def test_a_run_that_does_not_end_at_zero_still_knows_its_last_step() -> None:
    assert [e.is_last for e in evaluations([1.0, 0.9, 0.75], [1.0, 0.9])] == [False, True]


def test_the_step_is_the_distance_to_the_next_sigma_of_the_run() -> None:
    seen = evaluations([1.0, 0.8, 0.5, 0.1], [1.0, 0.9, 0.8, 0.5])
    assert [e.step for e in seen] == pytest.approx([0.2, 0.1, 0.3, 0.4])


def test_what_is_still_to_come_ends_with_the_end_of_sampling() -> None:
    seen = evaluations(GRID, [1.0, 0.7, 0.2])
    assert [e.following for e in seen] == [tuple(GRID[1:]), tuple(GRID[2:]), (0.0,)]


@pytest.mark.parametrize("off", [0.0, 3e-8, -3e-8])
@pytest.mark.parametrize("name", DENSE)
def test_however_dense_the_grid_the_next_sigma_is_the_next_one_of_the_grid(name: str, off: float) -> None:
    """Schedulers for video take steps that are smaller than samplers are off the grid; `off` is float32 rounding."""
    grid = DENSE[name]
    seen = evaluations(grid, [sigma * (1 + off) for sigma in grid[:-1]])
    for i, (evaluation, (sigma, following)) in enumerate(zip(seen, pairwise(grid))):
        assert evaluation.following == tuple(grid[i + 1 :])
        assert evaluation.step == pytest.approx(sigma - following, abs=1e-7 * sigma)
        assert evaluation.progress == pytest.approx(i / (len(grid) - 2))
        assert evaluation.is_last == (i == len(grid) - 2)


def test_a_first_sigma_a_hair_below_the_grid_counts_as_the_first() -> None:
    """So that a model may be asked at the sigma that it has a timestep for."""
    [first] = evaluations(GRID, [1.0 * (1 - 9e-4)])
    assert first.progress == 0.0 and first.following == tuple(GRID[1:]) and first.step == pytest.approx(0.2 - 9e-4)


@pytest.mark.parametrize(
    "grid", [[1.0, 0.0], [0.7, 0.5, 0.5, 0.5, 0.0], [1.0, 0.5, 0.0, 0.7, 0.3, 0.0], [0.1, 0.4, 0.9, 1.0], [0.5, 0.5]]
)
def test_unusual_grids_give_finite_steps_and_progress(grid: list[float]) -> None:
    for e in evaluations(grid, grid[:-1]):
        assert math.isfinite(e.step) and 0 <= e.progress <= 1 and e.following
    assert evaluations(grid, grid[:-1])[-1].ordinal == len(grid) - 2


NOT_KNOWN = [[0.0, 0.0], [], [1.0], [0.0]]


@pytest.mark.parametrize("handed", NOT_KNOWN)
def test_without_noise_levels_of_the_run_the_steps_to_come_are_taken_to_be_as_long_as_the_last(
    handed: list[float],
) -> None:
    seen = evaluations(handed, [1.0, 0.9, 0.8])
    assert [e.sigma for e in seen] == [1.0, 0.9, 0.8] and seen[0].is_last and not seen[2].is_last
    assert seen[2].step == pytest.approx(0.1) and seen[2].following[-1] == 0.0
    assert list(seen[2].following) == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("name", ["even", "simple, shift 3", "simple, shift 8"])
@pytest.mark.parametrize("calls", [1, 2])
def test_without_noise_levels_the_last_evaluation_is_never_taken_for_another(name: str, calls: int) -> None:
    grid = {"even": grids.even(20), "simple, shift 3": grids.simple(20, 3), "simple, shift 8": grids.simple(20, 8)}[
        name
    ]
    asked = [sigma - (sigma - following) * i / calls for sigma, following in pairwise(grid) for i in range(calls)]
    seen = evaluations([0.0, 0.0], asked)
    assert seen[-1].is_last and sum(not e.is_last for e in seen) > len(seen) / 2


@pytest.mark.parametrize("asked", [[0.5, 0.5, 0.7, 0.2], [0.0, 0.0], [1e-9, 0.5, 1e-12]])
def test_without_noise_levels_odd_evaluations_are_harmless(asked: list[float]) -> None:
    for e in evaluations([0.0, 0.0], asked):
        assert math.isfinite(e.step) and e.following and len(e.following) < 2000


def test_a_window_has_the_sigmas_of_its_ends() -> None:
    assert Window(0.25, 0.75).sigmas(lambda percent: 1 - percent) == (0.75, 0.25)
