"""CFG-Cache wherever the host has guidance: other nodes, guiders, conditionings and prediction types."""
import comfy.context_windows
import comfy.controlnet
import comfy.model_sampling
import comfy.samplers
import comfy.sample
import pytest
import torch
from comfy_extras import (nodes_apg, nodes_cfg, nodes_custom_sampler, nodes_eps, nodes_fresca, nodes_lumina2,
                          nodes_mahiro, nodes_model_advanced, nodes_pag, nodes_perpneg, nodes_sag, nodes_slg,
                          nodes_tcfg)
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.guidance import GuidanceSettings
from fastercache_pack.fastercache_core.schedule import Interval
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.attach import attach, last_report
from fastercache_pack.nodes.host.output_space import OutputSpace
from tiny import SPECS, conditioning, sample

STEPS = 16
NEVER = CacheSettings("never", GuidanceSettings(Interval(2, Window(1.0, 1.0))))
EVERY_SECOND = CacheSettings("every second", GuidanceSettings(Interval(2), "measured"))

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


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def estimates(model):
    return sum("ESTIMATE" in r["actions"].values() for r in last_report(model)["evaluations"])


@pytest.mark.parametrize("node", sorted(GUIDANCE_NODES))
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
def test_beside_another_guidance_node(tiny_models, node, ours_first):
    """Nothing skipped: the host's own to the bit. Skipped: near to it, and the other node still acts."""
    family = GUIDANCE_NODES[node][0]

    def both(settings):
        base = tiny_models(family)
        return put(node, attach(base, settings)) if ours_first else attach(put(node, base), settings)

    theirs = sample(put(node, tiny_models(family)), family, steps=STEPS)
    assert torch.equal(sample(both(NEVER), family, steps=STEPS), theirs)
    model = both(EVERY_SECOND)
    skipped = sample(model, family, steps=STEPS)
    assert estimates(model) == 6
    other_seed = sample(put(node, tiny_models(family)), family, steps=STEPS, seed=4)
    assert relative(skipped, theirs) < 0.25 * relative(other_seed, theirs)


@pytest.mark.parametrize("node", ["APG", "TCFG", "Mahiro", "FreSca", "RenormCFG", "RescaleCFG", "PAG"])
def test_the_estimate_is_nearer_to_full_than_fewer_steps_at_the_same_cost(tiny_models, node):
    theirs = sample(put(node, tiny_models("sd15")), "sd15", steps=STEPS)
    model = attach(put(node, tiny_models("sd15")), EVERY_SECOND)
    skipped = sample(model, "sd15", steps=STEPS)
    steps = -(-STEPS * last_report(model)["totals"]["rows"] // last_report(model)["totals"]["rows_full"])
    fewer = sample(put(node, tiny_models("sd15")), "sd15", steps=steps)
    assert relative(skipped, theirs) < relative(fewer, theirs)


def test_nag_mixes_the_branches_and_is_left_alone(tiny_models):
    """It switches itself off, silently, in a pass without the negative."""
    nodes_nag = pytest.importorskip("comfy_extras.nodes_nag", reason="this ComfyUI has no NAGuidance")
    nag = nodes_nag.NAGuidance.execute(tiny_models("sd15"), 5.0, 0.5, 1.5).result[0]
    model = attach(nag, EVERY_SECOND)
    assert torch.equal(sample(model, "sd15", steps=STEPS), sample(nag, "sd15", steps=STEPS))
    assert "NAGuidance" in last_report(model)["notes"][0]


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
    result = sample(model, "sd15", steps=STEPS, sampler=sampler, scheduler="karras")
    assert torch.isfinite(result).all()
    assert estimates(model) >= 5, last_report(model)["notes"]


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
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas,
                         disable_pbar=True)


@pytest.mark.parametrize("kind, branches", [
    ("CFGGuider", 2), ("PerpNeg", 3), ("regular", 3), ("nested", 3), ("BasicGuider", 1)])
def test_every_guider_of_the_host(tiny_models, kind, branches):
    theirs = sample_guider(custom_guider(kind, tiny_models("sd15")))
    assert torch.equal(sample_guider(custom_guider(kind, attach(tiny_models("sd15"), NEVER))), theirs)
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    result = sample_guider(custom_guider(kind, model))
    totals = last_report(model)["totals"]
    assert totals["rows_full"] == branches * STEPS
    assert estimates(model) == (6 if branches > 1 else 0)
    assert totals["rows"] == branches * STEPS - 6 * (branches - 1)
    assert relative(result, theirs) < 0.1


def test_a_cached_guider_used_twice_starts_afresh(tiny_models):
    guider = custom_guider("CFGGuider", attach(tiny_models("sd15"), EVERY_SECOND))
    assert torch.equal(sample_guider(guider), sample_guider(guider))


def area(cond, x, y):
    """The conditioning limited to an 8 x 8 corner of the latent."""
    return [[tensor, {**fields, "area": (8, 8, y, x), "strength": 1.0}] for tensor, fields in cond]


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
    assert last_report(model)["totals"]["cost"] < 1.0


def test_a_prompt_that_changes_half_way_forces_full_evaluations_there(tiny_models):
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    sample(model, "sd15", steps=STEPS, positive=CONDITIONINGS["one after the other"])
    skipped = ["ESTIMATE" in r["actions"].values() for r in last_report(model)["evaluations"]]
    change = next(i for i in range(5, STEPS) if not any(skipped[i:i + 3]))
    assert any(skipped[:change]) and any(skipped[change:]), "it starts again with what it then knows"


def test_each_context_window_of_a_long_video_has_its_own_difference(tiny_models):
    def windowed(settings):
        model = tiny_models("wan") if settings is None else attach(tiny_models("wan"), settings)
        model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
            context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
            context_length=3, context_overlap=1, context_stride=1, closed_loop=False, dim=2)
        return model

    latent = torch.zeros(1, 16, 6, 8, 8)
    theirs = sample(windowed(None), "wan", steps=STEPS, latent=latent)
    assert torch.equal(sample(windowed(NEVER), "wan", steps=STEPS, latent=latent), theirs)
    model = windowed(EVERY_SECOND)
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
