"""What is known of samplers, and that their step weights are those of the samplers themselves."""

import math
from itertools import pairwise

import pytest

from fastercache_core.solvers import SOLVERS, UNKNOWN, Solver, find_solver, unevenness
from support import grids
from support.samplers import SAMPLERS

SIGMAS = [0.97, 0.83, 0.7, 0.52, 0.31, 0.12, 0.0]
CORRECTED = [name for name, solver in SOLVERS.items() if solver.corrects]


def final(name: str, values: list[float], sigmas: list[float] = SIGMAS) -> float:
    """The latent, one number, that a sampler ends with where the denoised latents are `values`."""
    left = list(values)
    return SAMPLERS[name](lambda x, sigma: left.pop(0), 1.0, sigmas)


def moved_by(solver: Solver, changed: int, sigmas: list[float] = SIGMAS) -> float:
    """How far the final latent moves for one unit of the denoised latent at evaluation `changed`."""
    moved, last = 0.0, None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        weight, before = solver.step_weights(last, sigma, following)
        moved = moved * following / sigma + weight * (i == changed) + before * (i == changed + 1)
        last = sigma
    return moved


@pytest.mark.parametrize("sigmas", [SIGMAS, [1.0, 0.9, 0.8, 0.79, 0.2, 0.1, 0.05]], ids=["to zero", "part of the way"])
@pytest.mark.parametrize("changed", range(6))
@pytest.mark.parametrize("name", CORRECTED)
def test_a_change_of_one_evaluation_moves_the_latent_by_the_step_weights(
    name: str, changed: int, sigmas: list[float]
) -> None:
    values = [0.5, -0.2, 0.1, 0.7, 0.3, 0.2]
    other = [v + (i == changed) for i, v in enumerate(values)]
    moved = final(name, other, sigmas) - final(name, values, sigmas)
    assert moved == pytest.approx(moved_by(SOLVERS[name], changed, sigmas), abs=1e-9)


@pytest.mark.parametrize("name", CORRECTED)
def test_what_a_step_leaves_of_the_latent_and_its_weights_add_up_to_one(name: str) -> None:
    """A latent that is denoised to itself stays."""
    assert sum(SOLVERS[name].step_weights(0.9, 0.8, 0.6)) + 0.6 / 0.8 == pytest.approx(1.0)


@pytest.mark.parametrize("name", CORRECTED)
def test_the_first_step_and_the_last_look_back_no_more(name: str) -> None:
    assert SOLVERS[name].step_weights(None, 0.8, 0.6) == (pytest.approx(0.25), 0.0)
    assert SOLVERS[name].step_weights(0.9, 0.8, 0.0) == (1.0, 0.0)


@pytest.mark.parametrize("name", [*CORRECTED, "sample_heun"])
@pytest.mark.parametrize(
    "last, sigma, following",
    [
        (0.8, 0.8, 0.6),
        (0.8, 0.8, 0.8),
        (0.9, 0.8, 0.8),
        (0.6, 0.8, 0.9),
        (0.5, 0.0, 0.7),
        (0.0, 0.7, 0.3),
        (0.8, 0.0, 0.0),
    ],
)
def test_repeated_and_rising_sigmas_and_zero_have_finite_weights(
    name: str, last: float, sigma: float, following: float
) -> None:
    assert all(map(math.isfinite, SOLVERS[name].step_weights(last, sigma, following)))


def test_errors_are_corrected_for_three_samplers_and_never_where_noise_is_added() -> None:
    assert CORRECTED == ["sample_euler", "sample_dpmpp_2m", "sample_res_multistep"]
    assert not any(solver.noise for solver in SOLVERS.values() if solver.corrects)


def test_only_samplers_with_one_call_a_step_and_no_noise_walk_the_grid() -> None:
    walks = {name for name, solver in SOLVERS.items() if solver.walks_grid}
    assert {"sample_euler", "sample_dpmpp_2m", "sample_deis"} <= walks
    assert not walks & {"sample_heun", "sample_euler_ancestral", "sample_dpmpp_sde"}


def test_a_sampler_that_is_not_in_the_table_is_taken_for_the_worst_of_it() -> None:
    assert find_solver("sample_dpm_adaptive") is None and find_solver("sample_someone_elses") is UNKNOWN
    assert not (UNKNOWN.known or UNKNOWN.corrects or UNKNOWN.walks_grid)
    for sigmas in ((), (0.0, 0.0), grids.even(20), grids.simple(20, 8.0)):
        assert UNKNOWN.amplifies(sigmas) >= max(s.amplifies(sigmas) for s in SOLVERS.values() if s.order < 4)


def test_multistep_solvers_multiply_errors_where_steps_grow() -> None:
    smooth = [2.0**-i for i in range(8)]
    jump = [*smooth, smooth[-1] / 2**4, 0.0]
    for name, order in (("sample_unipc", 3), ("sample_deis", 3), ("sample_lms", 4), ("sample_gradient_estimation", 2)):
        assert find_solver(name).amplifies(smooth) == pytest.approx(2.0)
        assert find_solver(name).amplifies(jump) == pytest.approx(2 * 4.0 ** (order - 1))
    for name in ("sample_dpmpp_2m", "sample_res_multistep"):
        assert SOLVERS[name].amplifies(smooth) == pytest.approx(2.0)
        assert SOLVERS[name].amplifies(jump) == pytest.approx(2 * 4.0**2), "what is corrected goes through them again"
    for name in ("sample_euler", "sample_heun"):
        assert SOLVERS[name].amplifies(jump) == 1.0, "of first order, or begun anew with every step"
    assert SOLVERS["sample_euler_ancestral"].amplifies(jump) == SOLVERS["sample_er_sde"].amplifies(jump) == 2.0


def test_steps_that_are_not_known_are_taken_to_be_uneven() -> None:
    assert unevenness([]) == unevenness([0.0, 0.0]) == unevenness([0.5]) > 2
    assert unevenness([0.5, 0.5, 0.7, 0.3, 0.0]) >= 1


def test_churn_adds_noise_and_takes_corrections_away() -> None:
    plain, churned = find_solver("sample_euler"), find_solver("sample_euler", churn=0.5)
    assert plain and plain.corrects and plain.walks_grid
    assert churned and churned.noise and not churned.corrects and not churned.walks_grid
    assert churned.law == Solver().law and churned.law.low < plain.law.low
