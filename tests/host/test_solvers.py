"""The steps that corrections reckon with are those of the host's own samplers."""
import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core.correction import SOLVERS, step_weights
from fastercache_pack.nodes.host.samplers import sampler_facts

SIGMAS = [0.97, 0.83, 0.7, 0.52, 0.31, 0.12, 0.0]


class Network:
    """Gives chosen denoised latents, whatever it is asked."""

    def __init__(self, values):
        self.values = list(values)
        self.inner_model = self

    def __call__(self, x, sigma, **kwargs):
        return torch.full_like(x, self.values.pop(0))


def host_result(name, values):
    sampler = comfy.samplers.sampler_object(name)
    x, sigmas = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.tensor(SIGMAS, dtype=torch.float64)
    return sampler.sampler_function(Network(values), x, sigmas, disable=True).mean().item()


def moved_by(solver, changed):
    """How far the final latent moves for one unit of the denoised latent at evaluation `changed`."""
    moved, last = 0.0, None
    for i, (sigma, following) in enumerate(zip(SIGMAS, SIGMAS[1:])):
        weight, before = step_weights(solver, last, sigma, following)
        moved = moved * following / sigma + weight * (i == changed) + before * (i == changed + 1)
        last = sigma
    return moved


@pytest.mark.parametrize("changed", range(len(SIGMAS) - 1))
@pytest.mark.parametrize("name", SOLVERS)
def test_a_change_of_one_evaluation_moves_the_latent_as_foreseen(name, changed):
    assert sampler_facts(comfy.samplers.sampler_object(name)).solver == name
    values = [0.5, -0.2, 0.1, 0.7, 0.3, 0.2]
    other = [v + (i == changed) for i, v in enumerate(values)]
    assert host_result(name, other) - host_result(name, values) == pytest.approx(moved_by(name, changed), abs=1e-9)
