"""What is known of samplers is what the host's own do: their calls, their noise, and the steps behind corrections."""

from itertools import pairwise
from types import SimpleNamespace

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core.solvers import SOLVERS, Solver
from fastercache_pack.nodes.host.compatibility import RunSetup

# Not down to 0, where only the last evaluation would count.
SIGMAS = [0.97, 0.83, 0.7, 0.52, 0.31, 0.12, 0.05]
VALUES = [0.5, -0.2, 0.1, 0.7, 0.3, 0.2]
CORRECTED = [name for name, solver in SOLVERS.items() if solver.corrects]


class Network:
    """Gives chosen denoised latents, whatever it is asked."""

    def __init__(self, values):
        self.values = list(values)
        self.inner_model = self.model_patcher = self

    def get_model_object(self, name):
        """Samplers of newer hosts look at the model's sampling."""
        return comfy.model_sampling.CONST()

    def __call__(self, x, sigma, **kwargs):
        return torch.full_like(x, self.values.pop(0))


def host_sampler(function):
    """The host's SAMPLER that runs `function`."""
    return comfy.samplers.sampler_object(function.removeprefix("sample_"))


def host_result(function, values, sigmas=SIGMAS):
    x, sigmas = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.tensor(sigmas, dtype=torch.float64)
    return host_sampler(function).sampler_function(Network(values), x, sigmas, disable=True).mean().item()


def moved_by(solver, changed):
    """How far the final latent moves for one unit of the denoised latent at evaluation `changed`."""
    moved, last = 0.0, None
    for i, (sigma, following) in enumerate(pairwise(SIGMAS)):
        weight, before = solver.step_weights(last, sigma, following)
        moved = moved * following / sigma + weight * (i == changed) + before * (i == changed + 1)
        last = sigma
    return moved


@pytest.mark.parametrize("changed", range(len(VALUES)))
@pytest.mark.parametrize("function", CORRECTED)
def test_a_change_of_one_evaluation_moves_the_latent_by_the_weights_of_its_step(function, changed):
    other = [value + (i == changed) for i, value in enumerate(VALUES)]
    moved = host_result(function, other) - host_result(function, VALUES)
    assert moved == pytest.approx(moved_by(SOLVERS[function], changed), abs=1e-9) and abs(moved) > 1e-3


@pytest.mark.parametrize("function", CORRECTED)
def test_a_step_to_the_end_goes_to_the_denoised_latent(function):
    assert SOLVERS[function].step_weights(0.3, 0.1, 0.0) == (1.0, 0.0)
    assert host_result(function, VALUES, [*SIGMAS[:-1], 0.0]) == pytest.approx(VALUES[-1])


@pytest.mark.parametrize("function", CORRECTED)
def test_the_solver_of_a_run_is_that_of_its_samplers_function(function):
    setup = RunSetup(None, host_sampler(function), tuple(SIGMAS), (1, 1, 2, 2))
    assert setup.solver is SOLVERS[function]


def test_with_churn_a_sampler_adds_noise_and_is_not_corrected():
    sampler = comfy.samplers.KSAMPLER(host_sampler("sample_euler").sampler_function, extra_options={"s_churn": 0.5})
    guided = SimpleNamespace(conds={"positive": [], "negative": []}, cfg=4.0)
    solver = RunSetup(guided, sampler, tuple(SIGMAS), (1, 1, 2, 2)).solver
    assert solver == Solver(noise=True) and not solver.corrects and not solver.walks_grid
