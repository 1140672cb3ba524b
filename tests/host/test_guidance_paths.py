"""CFG-Cache wherever the host has guidance: other nodes, guiders, conditionings and prediction types."""

import math

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_custom_sampler,
    nodes_eps,
    nodes_fresca,
    nodes_lumina2,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_slg,
    nodes_tcfg,
)
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.solvers import SOLVERS
from fastercache_pack.nodes.host.prediction import OutputSpace
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.guidance import EVERY_SECOND, NEVER, STEPS, area, windowed
from support.runs import estimated, estimates, notes, relative, totals
from support.tiny import SPECS, conditioning, sample

SMALL = {name: torch.zeros(1, SPECS[name]["lat"][0], 8, 8) for name in ("sd15", "sd3")}

# Nodes that read or change the unconditional result: name -> (family, what puts it on a model).
GUIDANCE_NODES = {
    "APG": ("sd15", lambda m: nodes_apg.APG.execute(m, 1.0, 5.0, -0.5)),
    "TCFG": ("sd15", lambda m: nodes_tcfg.TCFG.execute(m)),
    "CFGZeroStar": ("sd3", lambda m: nodes_cfg.CFGZeroStar.execute(m)),
    "CFGNorm": ("sd3", lambda m: nodes_cfg.CFGNorm.execute(m, 1.0)),
    "Mahiro": ("sd15", lambda m: nodes_mahiro.Mahiro.execute(m)),
    "FreSca": ("sd15", lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.25, 4)),
    "RenormCFG": ("sd15", lambda m: nodes_lumina2.RenormCFG.execute(m, 100.0, 1.0)),
    "EpsilonScaling": ("sd15", lambda m: nodes_eps.EpsilonScaling.execute(m, 1.005)),
    "PAG": ("sd15", lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0)),
    "SAG": ("sd15", lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)),
    "SLG": ("sd3", lambda m: nodes_slg.SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "1", "")),
    "RescaleCFG": ("sd15", lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)),
}


def put(node, model):
    """The MODEL that a host node returns."""
    result = GUIDANCE_NODES[node][1](model)
    return (result.result if hasattr(result, "result") else result)[0]


# Those beside which the tiny model's differences are smooth enough to be nearer than fewer steps.
SMOOTH = {"APG", "TCFG", "Mahiro", "FreSca", "RenormCFG", "RescaleCFG", "PAG"}


@pytest.mark.parametrize("node", sorted(GUIDANCE_NODES))
def test_beside_another_guidance_node(tiny_models, node):
    """Nothing skipped: the host's own to the bit. Skipped: near to it, and the other node still acts."""
    family = GUIDANCE_NODES[node][0]

    def sampled(model, **options):
        return sample(model, family, **{"steps": STEPS, "latent": SMALL[family], **options})

    theirs = sampled(put(node, tiny_models(family)))
    assert torch.equal(sampled(put(node, attach(tiny_models(family), NEVER))), theirs)
    assert torch.equal(sampled(attach(put(node, tiny_models(family)), NEVER)), theirs)
    first = put(node, attach(tiny_models(family), EVERY_SECOND))
    last = attach(put(node, tiny_models(family)), EVERY_SECOND)
    skipped = sampled(last)
    assert torch.equal(sampled(first), skipped), "in either order of the nodes"
    assert estimates(first) == estimates(last) == 6
    other_seed = sampled(put(node, tiny_models(family)), seed=4)
    assert 0 < relative(skipped, theirs) < 0.25 * relative(other_seed, theirs)
    if node in SMOOTH:
        steps = -(-STEPS * totals(last)["rows"] // totals(last)["rows_full"])
        fewer = sampled(put(node, tiny_models(family)), steps=steps)
        assert relative(skipped, theirs) < relative(fewer, theirs), "nearer than fewer steps at the same cost"


def test_nag_mixes_the_branches_and_is_left_alone(tiny_models):
    """It switches itself off, silently, in a pass without the negative."""
    nodes_nag = pytest.importorskip("comfy_extras.nodes_nag", reason="this ComfyUI has no NAGuidance")
    nag = nodes_nag.NAGuidance.execute(tiny_models("sd15"), 5.0, 0.5, 1.5).result[0]
    model = attach(nag, EVERY_SECOND)
    assert torch.equal(sample(model, "sd15", steps=STEPS), sample(nag, "sd15", steps=STEPS))
    assert notes(model)[0] == messages.NAG


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "euler_ancestral_cfg_pp"])
def test_cfg_pp_samplers_see_a_consistent_estimate(tiny_models, sampler):
    options = dict(steps=STEPS, sampler=sampler, cfg=1.5)
    theirs = sample(tiny_models("sd15"), "sd15", **options)
    assert torch.equal(sample(attach(tiny_models("sd15"), NEVER), "sd15", **options), theirs)
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    assert relative(sample(model, "sd15", **options), theirs) < 0.1
    assert estimates(model) == 6


SAMPLERS = [name for name in comfy.samplers.KSampler.SAMPLERS if "dpm_adaptive" not in name and "dpm_fast" not in name]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_of_the_host_is_known_and_finite(tiny_models, sampler):
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    result = sample(model, "sd15", steps=STEPS, sampler=sampler, scheduler="karras", latent=SMALL["sd15"])
    assert torch.isfinite(result).all()
    assert estimates(model) >= 5, notes(model)
    # The last steps, to sigma 0, need fewer calls.
    calls = (len(last_report(model)["evaluations"]) - 1) / (STEPS - 1)
    assert SOLVERS[last_report(model)["run"]["sampler"]].calls == math.ceil(calls)


def custom_guider(kind, model):
    """A guider of the host with its conditionings, as its node makes it."""
    positive, negative, third = (conditioning("sd15", seed) for seed in (1, 2, 5))
    if kind == "CFGGuider":
        return nodes_custom_sampler.CFGGuider.execute(model, positive, negative, 4.0).result[0]
    if kind == "BasicGuider":
        return nodes_custom_sampler.BasicGuider.execute(model, positive).result[0]
    if kind == "PerpNeg":
        return nodes_perpneg.PerpNegGuider.execute(model, positive, negative, third, 4.0, 1.0).result[0]
    return nodes_custom_sampler.DualCFGGuider.execute(model, positive, third, negative, 4.0, 3.0, kind).result[0]


def sample_guider(guider, steps=STEPS):
    noise = torch.randn((1, *SPECS["sd15"]["lat"]), generator=torch.Generator().manual_seed(3))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "karras", steps)
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
    )


@pytest.mark.parametrize(
    "kind, branches", [("CFGGuider", 2), ("PerpNeg", 3), ("regular", 3), ("nested", 3), ("BasicGuider", 1)]
)
def test_every_guider_of_the_host(tiny_models, kind, branches):
    theirs = sample_guider(custom_guider(kind, tiny_models("sd15")))
    assert torch.equal(sample_guider(custom_guider(kind, attach(tiny_models("sd15"), NEVER))), theirs)
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    result = sample_guider(custom_guider(kind, model))
    assert estimates(model) == (6 if branches > 1 else 0)
    assert totals(model)["rows_full"] == branches * STEPS
    assert totals(model)["rows"] == branches * STEPS - 6 * (branches - 1)
    assert relative(result, theirs) < 0.1


def test_a_cached_guider_used_twice_starts_afresh(tiny_models):
    guider = custom_guider("CFGGuider", attach(tiny_models("sd15"), EVERY_SECOND))
    assert torch.equal(sample_guider(guider), sample_guider(guider))


CONDITIONINGS = {
    "several combined": conditioning("sd15", 1) + conditioning("sd15", 6),
    "regional": conditioning("sd15", 1) + area(conditioning("sd15", 6), 0, 0) + area(conditioning("sd15", 7), 8, 8),
    "one after the other": conditioning("sd15", 1, start_percent=0.0, end_percent=0.4)
    + conditioning("sd15", 6, start_percent=0.4, end_percent=1.0),
    "longer than the negative": [[torch.cat([c := conditioning("sd15", 1)[0][0]] * 5, 1), {}]],
}


@pytest.mark.parametrize("kind", sorted(CONDITIONINGS))
def test_conditionings_that_people_build(tiny_models, kind):
    options = dict(steps=STEPS, positive=CONDITIONINGS[kind])
    theirs = sample(tiny_models("sd15"), "sd15", **options)
    assert torch.equal(sample(attach(tiny_models("sd15"), NEVER), "sd15", **options), theirs)
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    assert relative(sample(model, "sd15", **options), theirs) < 0.05
    assert estimates(model) >= 3
    assert totals(model)["cost"] < 1.0


def test_a_prompt_that_changes_half_way_forces_full_evaluations_there(tiny_models):
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    sample(model, "sd15", steps=STEPS, positive=CONDITIONINGS["one after the other"])
    skipped = estimated(model)
    change = next(i for i in range(5, STEPS) if not any(skipped[i : i + 3]))
    assert any(skipped[:change]) and any(skipped[change:]), "it starts again with what it then knows"


def test_each_context_window_of_a_long_video_has_its_own_difference(tiny_models):
    latent = torch.zeros(1, 16, 6, 8, 8)
    theirs = sample(windowed(tiny_models("wan")), "wan", steps=STEPS, latent=latent)
    unskipped = windowed(attach(tiny_models("wan"), NEVER))
    assert torch.equal(sample(unskipped, "wan", steps=STEPS, latent=latent), theirs)
    model = windowed(attach(tiny_models("wan"), EVERY_SECOND))
    assert relative(sample(model, "wan", steps=STEPS, latent=latent), theirs) < 0.1
    assert estimates(model) == 6


PREDICTIONS = ["EPS", "V_PREDICTION", "EDM", "CONST", "X0", "IMG_TO_IMG", "COSMOS_RFLOW"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_output_space_inverts_the_hosts_own_formula(prediction):
    """Oracle: make denoised latents from known outputs by the host, and get the outputs back."""
    kind = getattr(comfy.model_sampling, prediction)
    sampling = type("Sampling", (comfy.model_sampling.ModelSamplingContinuousEDM, kind), {})()
    sampling.sigma_data = getattr(sampling, "sigma_data", 1.0)
    x, cond, uncond = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.7, 0.7], dtype=torch.float64)
    space = OutputSpace(sampling, sigma, x)
    denoised = [sampling.calculate_denoised(sigma, output, x) for output in (cond, uncond)]
    assert torch.allclose(space.output(denoised[0]), cond)
    assert torch.allclose(space.difference(denoised[1], denoised[0]), uncond - cond)
    assert torch.allclose(denoised[0] + space.scale * (uncond - cond), denoised[1])
    assert torch.allclose(space.denoised(cond), denoised[0])


def test_img2img_and_inpainting(tiny_models):
    latent = torch.randn((1, *SPECS["sd15"]["lat"]), generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1.0
    options = dict(steps=STEPS, latent=latent, denoise=0.6, noise_mask=mask)
    theirs = sample(tiny_models("sd15"), "sd15", **options)
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    assert relative(sample(model, "sd15", **options), theirs) < 0.05
    assert estimates(model) == 6
