"""Facts about the host's samplers: how often they call the network, and whether they add noise."""
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SamplerFacts:
    """calls: network calls a step; noise: fresh noise is added on the way; order: of the solver; solver:
    the entry of `correction.SOLVERS` that tells its steps, None where there is none."""
    calls: int = 1
    noise: bool = False
    order: int = 1
    solver: str | None = None


SAMPLERS = {
    "sample_euler": SamplerFacts(solver="euler"),
    "sample_euler_cfg_pp": SamplerFacts(),
    "sample_euler_ancestral": SamplerFacts(noise=True),
    "sample_euler_ancestral_RF": SamplerFacts(noise=True),
    "sample_euler_ancestral_cfg_pp": SamplerFacts(noise=True),
    "sample_ddpm": SamplerFacts(noise=True),
    "sample_lcm": SamplerFacts(noise=True),
    "sample_lms": SamplerFacts(order=4),
    "sample_ipndm": SamplerFacts(order=4),
    "sample_ipndm_v": SamplerFacts(order=4),
    "sample_deis": SamplerFacts(order=3),
    "sample_unipc": SamplerFacts(order=3),
    "sample_unipc_bh2": SamplerFacts(order=3),
    "sample_dpmpp_2m": SamplerFacts(order=2, solver="dpmpp_2m"),
    "sample_dpmpp_2m_cfg_pp": SamplerFacts(order=2),
    "sample_res_multistep": SamplerFacts(order=2, solver="res_multistep"),
    "sample_res_multistep_cfg_pp": SamplerFacts(order=2),
    "sample_res_multistep_ancestral": SamplerFacts(order=2, noise=True),
    "sample_res_multistep_ancestral_cfg_pp": SamplerFacts(order=2, noise=True),
    "sample_gradient_estimation": SamplerFacts(order=2),
    "sample_gradient_estimation_cfg_pp": SamplerFacts(order=2),
    "sample_dpmpp_2m_sde": SamplerFacts(order=2, noise=True),
    "sample_dpmpp_2m_sde_gpu": SamplerFacts(order=2, noise=True),
    "sample_dpmpp_2m_sde_heun": SamplerFacts(order=2, noise=True),
    "sample_dpmpp_2m_sde_heun_gpu": SamplerFacts(order=2, noise=True),
    "sample_dpmpp_3m_sde": SamplerFacts(order=3, noise=True),
    "sample_dpmpp_3m_sde_gpu": SamplerFacts(order=3, noise=True),
    "sample_er_sde": SamplerFacts(order=3, noise=True),
    "sample_sa_solver": SamplerFacts(order=3, noise=True),
    "sample_heun": SamplerFacts(calls=2, order=2),
    "sample_heunpp2": SamplerFacts(calls=3, order=2),
    "sample_dpm_2": SamplerFacts(calls=2, order=2),
    "sample_dpm_2_ancestral": SamplerFacts(calls=2, order=2, noise=True),
    "sample_dpm_2_ancestral_RF": SamplerFacts(calls=2, order=2, noise=True),
    "sample_dpmpp_2s_ancestral": SamplerFacts(calls=2, order=2, noise=True),
    "sample_dpmpp_2s_ancestral_RF": SamplerFacts(calls=2, order=2, noise=True),
    "sample_dpmpp_2s_ancestral_cfg_pp": SamplerFacts(calls=2, order=2, noise=True),
    "sample_dpmpp_sde": SamplerFacts(calls=2, order=2, noise=True),
    "sample_dpmpp_sde_gpu": SamplerFacts(calls=2, order=2, noise=True),
    "sample_sa_solver_pece": SamplerFacts(calls=2, order=3, noise=True),
    "sample_seeds_2": SamplerFacts(calls=2, order=2, noise=True),
    "sample_seeds_3": SamplerFacts(calls=3, order=3, noise=True),
    "sample_exp_heun_2_x0": SamplerFacts(calls=2, order=2),
    "sample_exp_heun_2_x0_sde": SamplerFacts(calls=2, order=2, noise=True),
}


def sampler_name(sampler):
    """Name of a SAMPLER object's function, as in the table; its class name where it has none."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__)


def sampler_facts(sampler):
    """The table's entry for a SAMPLER object, or None where evaluations cannot be foreseen.

    None stands for adaptive step sizes and for samplers from elsewhere: nothing is known about
    the order or number of their calls.
    """
    facts = SAMPLERS.get(sampler_name(sampler))
    if facts is not None and getattr(sampler, "extra_options", {}).get("s_churn", 0) > 0:
        return replace(facts, noise=True, solver=None)
    return facts
