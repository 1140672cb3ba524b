"""CFG-Cache beside what people put on conditionings: masks, ControlNet, hooks, GLIGEN, inpaint models; and
beside nodes that read the unconditional result."""

import functools
from dataclasses import replace

import comfy.gligen
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_slg
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Interval
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.conditioning import is_active
from fastercache_pack.nodes.host.wrappers import attach, last_report

from nodes import ConditioningAverage, ConditioningCombine, ConditioningSetMask
from support import tiny
from support.guidance import EVERY_SECOND, NEVER, STEPS, Controlled, cfg_cache, hooked, prompt, sample, with_steps
from support.runs import estimated, estimates, evaluations, notes, relative, totals
from support.tiny import CPU, SPECS, conditioning

HALVES = torch.zeros(2, 64, 64)
HALVES[0, :, :32] = HALVES[1, :, 32:] = 1.0


@pytest.fixture(scope="module")
def plain(tiny_models):
    """Pictures of two plain prompts, by family and seed: what features and estimates are compared with."""
    return functools.cache(lambda family="sd15", seed=3: sample(tiny_models(family), family, seed=seed))


@pytest.fixture
def compared(plain):
    """Samples in full, with nothing skipped (the host's own to the bit) and with skipping (near).

    The control for "near" is how far another seed's picture is. Returns (full, skipped, MODEL).
    """

    def compare(models, family="sd15", skipped=6, **options):
        theirs = sample(models(family), family, **options)
        assert torch.equal(sample(attach(models(family), NEVER), family, **options), theirs)
        model = attach(models(family), EVERY_SECOND)
        result = sample(model, family, **options)
        assert estimates(model) == skipped, full_at(model)
        assert totals(model)["cost"] < 1.0
        assert 0 < relative(result, theirs) < 0.1 * relative(plain(seed=4), plain())
        return theirs, result, model

    return compare


def full_at(model):
    """For every evaluation of the last run: was no branch skipped?"""
    return [not skipped for skipped in estimated(model)]


def first_after(model, percent):
    """Ordinal of the first evaluation of the last run at or after this part of sampling."""
    start = model.get_model_object("model_sampling").percent_to_sigma(percent)
    return next(r["ordinal"] for r in last_report(model)["evaluations"] if r["sigma"] <= start)


def masked(cond, mask, strength):
    return ConditioningSetMask().append(cond, mask, "default", strength)[0]


def combined(a, b):
    return ConditioningCombine().combine(a, b)[0]


PROMPTS = {"positive": prompt(1), "negative": prompt(2)}
MASKED = combined(masked(prompt(1), HALVES[0], 1.0), masked(prompt(6), HALVES[1], 0.6))
CONDITIONINGS = {
    "masks": dict(positive=MASKED),
    "masks over a background": dict(positive=combined(MASKED, prompt(7))),
    "masked negative": dict(negative=combined(masked(prompt(2), HALVES[0], 1.0), masked(prompt(8), HALVES[1], 0.5))),
    "averaged": dict(positive=ConditioningAverage().addWeighted(prompt(1), prompt(6), 0.3)[0]),
    "several negatives": dict(negative=combined(combined(prompt(2), prompt(8)), prompt(9))),
}


@pytest.mark.parametrize("kind", sorted(CONDITIONINGS))
def test_masked_averaged_and_several_conditionings(tiny_models, compared, plain, kind):
    theirs, result, _ = compared(tiny_models, **CONDITIONINGS[kind])
    assert relative(result, theirs) < 0.5 * relative(plain(), theirs), "nearer than without the conditioning"


@pytest.mark.parametrize(
    "kind",
    [
        "ModelSamplingDiscrete",
        "ModelSamplingDiscreteFlow",
        "ModelSamplingFlux",
        "ModelSamplingContinuousEDM",
        "StableCascadeSampling",
    ],
)
def test_a_timestep_range_is_open_exactly_when_the_host_says_so(kind):
    """Also where a step lies on the border: the host compares sigmas of 32 bits with numbers of 64."""
    sampling, x = getattr(comfy.model_sampling, kind)(), torch.zeros(1, 4, 8, 8)
    for percent in (0.1, 0.25, 0.3, 0.5, 0.7):
        border = sampling.percent_to_sigma(percent)
        at = torch.tensor(float(border))
        for sigma in (at, torch.nextafter(at, at * 2), torch.nextafter(at, at / 2)):
            for range_ in ({"timestep_start": border}, {"timestep_end": border}):
                cond = {"model_conds": {}, "uuid": "a", **range_}
                theirs = comfy.samplers.get_area_and_mult(cond, x, sigma[None]) is not None
                assert is_active(cond, float(sigma)) == theirs, (range_, float(sigma))


@pytest.mark.parametrize("only_positive, rows", [(False, (32, 26)), (True, (16, 16))])
def test_a_controlnet_is_not_evaluated_for_a_skipped_branch(tiny_models, plain, only_positive, rows):
    control = Controlled(only_positive=only_positive)
    theirs, all_rows = control.sample(tiny_models("sd15"))
    same, same_rows = control.sample(attach(tiny_models("sd15"), NEVER))
    assert torch.equal(same, theirs)
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    result, rows_run = control.sample(model)
    assert estimates(model) == 6
    assert (all_rows, same_rows, rows_run) == (rows[0], *rows)
    assert 0 < relative(result, theirs) < 0.5 * relative(plain(), theirs), "nearer than without the ControlNet"


@pytest.mark.parametrize("only_positive", [False, True])
@pytest.mark.parametrize("start, end, border", [(0.0, 0.5, 0.5), (0.4, 1.0, 0.4)])
def test_a_controlnet_that_starts_or_ends_half_way_forces_full_evaluations_there(
    tiny_models, only_positive, start, end, border
):
    control = Controlled(start, end, only_positive)
    theirs, _ = control.sample(tiny_models("sd15"))
    model = attach(tiny_models("sd15"), EVERY_SECOND)
    result, rows = control.sample(model)
    full, change = full_at(model), first_after(model, border)
    assert not all(full[:change]) and not all(full[change:])
    assert sum(full[change - 1 : change + 4]) >= 3, "the differences from before are forgotten"
    assert all(full[change + (end == border) : change + 3])
    other = Controlled(only_positive=only_positive).sample(tiny_models("sd15"))[0]
    assert relative(result, theirs) < 0.5 * relative(other, theirs), "nearer than a control that never ends"
    assert 0 < rows < 2 * STEPS


@pytest.mark.parametrize("who", ["positive", "negative"])
def test_a_lora_on_one_conditioning_only(tiny_models, compared, plain, who):
    before = plain()
    options = {who: hooked(tiny_models("sd15"), PROMPTS[who])}
    theirs, result, _ = compared(tiny_models, **options)
    assert relative(result, theirs) < 0.25 * relative(before, theirs), "nearer than without the LoRA"
    assert torch.equal(sample(tiny_models("sd15"), "sd15"), before), "the weights are the model's again"


@pytest.mark.parametrize("who", ["positive", "negative"])
def test_a_lora_that_changes_its_strength_half_way_forces_full_evaluations_there(tiny_models, compared, who):
    options = {who: hooked(tiny_models("sd15"), PROMPTS[who], [(1.0, 0.0, 1), (0.2, 0.5, 1)])}
    _, _, model = compared(tiny_models, skipped=5, **options)
    full, change = full_at(model), first_after(model, 0.5)
    assert not all(full[:change]) and all(full[change : change + 3]) and not all(full[change + 3 :])


@pytest.mark.parametrize("who", ["positive", "negative"])
def test_keyframes_that_last_for_a_number_of_steps_keep_their_steps(tiny_models, who):
    """The host counts the steps of a keyframe while a branch runs; a skipped step is a step too."""
    strengths = {}

    def watched(settings):
        model = tiny_models("sd15") if settings is None else attach(tiny_models("sd15"), settings)
        cond_ = hooked(model, PROMPTS[who], [(1.0, 0.0, 1), (0.1, 0.2, 6), (1.0, 0.25, 1)])
        [hook] = cond_[0][1]["hooks"].hooks
        seen = strengths[settings] = []
        sample(model, "sd15", **{who: cond_}, callback=lambda *_: seen.append(hook.hook_keyframe.strength))
        return model

    watched(None)
    model = watched(EVERY_SECOND)
    assert strengths[EVERY_SECOND] == strengths[None]
    changes = [i for i in range(1, STEPS) if strengths[None][i] != strengths[None][i - 1]]
    assert len(changes) == 2
    for change in changes:
        assert all(full_at(model)[change : change + 3])


def gligen_model(width=48):
    """The smallest GLIGEN that the host takes: one gated layer for each transformer of the tiny sd15."""
    widths = [32, 64, 64, 64, 64, 32, 32]
    layers = [comfy.gligen.GatedSelfAttentionDense(w, width, 2, w // 2) for w in widths]
    network = comfy.gligen.Gligen(layers, comfy.gligen.PositionNet(width, width), width)
    tiny.random_weights(network, 12)
    return comfy.model_patcher.ModelPatcher(network.eval(), load_device=CPU, offload_device=CPU)


def test_gligen_boxes(tiny_models, compared, plain):
    box = torch.randn(1, 48, generator=torch.Generator().manual_seed(13))
    [[tensor, fields]] = prompt(1)
    boxed = [[tensor, {**fields, "gligen": ("position", gligen_model(), [(box, 4, 4, 2, 2)])}]]
    theirs, result, _ = compared(tiny_models, positive=boxed)
    assert relative(result, theirs) < 0.25 * relative(plain(), theirs), "nearer than without the box"


@pytest.fixture
def inpaint_models(monkeypatch):
    """A tiny inpaint model, whose network takes mask and masked picture as further channels."""
    spec = {**SPECS["sd15"], "cfg": {**SPECS["sd15"]["cfg"], "in_channels": 9}}
    monkeypatch.setitem(SPECS, "sd15 inpaint", spec)
    model = tiny.build("sd15 inpaint")
    assert model.model.concat_keys == ("mask", "masked_image")
    return lambda name: model.clone()


def inpainting(seed, batch):
    """Options to inpaint the right half of `batch` different latents."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, 4, 8, 8, generator=g)
    mask = torch.zeros(batch, 1, 64, 64)
    mask[..., 32:] = 1.0
    fields = {"concat_latent_image": latent, "concat_mask": mask}
    conds = {
        who: [[tensor, {**old, **fields}] for tensor, old in prompt(seed)]
        for who, seed in (("positive", 1), ("negative", 2))
    }
    return dict(latent=latent, noise_mask=mask, **conds)


def test_an_inpaint_model_with_a_batch_of_different_pictures(inpaint_models, compared):
    options = inpainting(8, batch=2)
    theirs, result, _ = compared(inpaint_models, "sd15 inpaint", **options)
    for picture, full in zip(result, theirs):
        assert relative(picture, full) < 0.1 * relative(theirs[1], theirs[0]), "nearer than the neighbour"
    elsewhere = sample(
        inpaint_models("sd15 inpaint"), "sd15 inpaint", **{**inpainting(9, 2), "latent": options["latent"]}
    )
    assert relative(result, theirs) < 0.5 * relative(elsewhere, theirs), "nearer than with another picture to fill"
    one = {**options, "latent": options["latent"][:1], "noise_mask": options["noise_mask"][:1]}
    alone = sample(attach(inpaint_models("sd15 inpaint"), EVERY_SECOND), "sd15 inpaint", **one)
    assert relative(alone[0], result[0]) < 1e-4, "a picture does not depend on its neighbours"


def threshold(args, look):
    """A sampler_cfg_function as dynamic thresholding nodes install it."""
    assert torch.equal(args["uncond"], args["input"] - args["uncond_denoised"])
    assert torch.equal(args["cond"], args["input"] - args["cond_denoised"])
    look(args, [args["input_cond"], args["input_uncond"]], args["cond_denoised"], args["uncond_denoised"])
    guided = args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
    limit = args["cond"].abs().flatten(1).quantile(0.995, dim=1).view(-1, 1, 1, 1)
    return torch.maximum(torch.minimum(guided, limit), -limit)


def mix_before(args, look):
    """A sampler_pre_cfg_function that draws the two results together."""
    cond, uncond = args["conds_out"]
    look(args, args["conds"], cond, uncond)
    return [cond, torch.lerp(uncond, cond, 0.2)]


def mix_after(args, look):
    """A sampler_post_cfg_function that goes part of the way to the unconditional result."""
    cond, uncond = args["cond_denoised"], args["uncond_denoised"]
    assert torch.allclose(args["denoised"], uncond + (cond - uncond) * args["cond_scale"])
    look(args, [args["cond"], args["uncond"]], cond, uncond)
    return torch.lerp(args["denoised"], uncond, 0.1)


READERS = {
    "sampler_cfg_function": (threshold, "set_model_sampler_cfg_function"),
    "sampler_pre_cfg_function": (mix_before, "set_model_sampler_pre_cfg_function"),
    "sampler_post_cfg_function": (mix_after, "set_model_sampler_post_cfg_function"),
}


def with_reader(model, kind, look=lambda *_: None):
    function, install = READERS[kind]
    getattr(model, install)(lambda args: function(args, look))
    return model


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("kind", sorted(READERS))
def test_functions_that_read_the_unconditional_result_get_a_good_estimate(tiny_models, plain, kind, family):
    """At every evaluation the host itself computes the true result on the same latent, to compare with."""
    errors, differences = [], []

    def look(args, conds, cond, uncond):
        true = comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])
        assert torch.isfinite(uncond).all() and uncond.any()
        assert relative(cond, true[0]) < 1e-5, "the conditional result is always computed"
        errors.append(relative(uncond, true[1]))
        differences.append(relative(cond, true[1]))

    theirs = sample(with_reader(tiny_models(family), kind), family)
    assert torch.equal(sample(attach(with_reader(tiny_models(family), kind), NEVER), family), theirs)
    model = attach(with_reader(tiny_models(family), kind, look), EVERY_SECOND)
    result = sample(model, family)
    full = full_at(model)
    assert full.count(False) == 6 and len(errors) == STEPS
    for was_full, error, difference in zip(full, errors, differences):
        assert error < 1e-5 if was_full else 1e-6 < error < difference, "worse than no guidance at all"
    later = [error / difference for was_full, error, difference in zip(full, errors, differences) if not was_full][1:]
    assert max(later) < 0.5, "the first estimate is made from the noisiest steps, the others must be better"
    assert relative(result, theirs) < 0.25 * relative(plain(family, 4), plain(family))


def skip_layers(model, end):
    return nodes_slg.SkipLayerGuidanceDiTSimple.execute(model, 0.0, end, "1", "").result[0]


@pytest.mark.parametrize("settings", [EVERY_SECOND, NEVER, with_steps()], ids=["skipping", "never", "steps"])
def test_skip_layer_guidance_that_runs_the_branches_itself_is_left_alone_and_that_is_said(tiny_models, settings):
    """A prediction of one branch alone would be worse than fewer steps: guidance multiplies its error."""
    theirs = sample(skip_layers(tiny_models("sd3"), 1.0), "sd3")
    assert not torch.equal(theirs, sample(tiny_models("sd3"), "sd3")), "it acts"
    model = attach(skip_layers(tiny_models("sd3"), 1.0), settings)
    assert torch.equal(sample(model, "sd3"), theirs)
    assert estimates(model) == 0 and totals(model)["rows"] == 2 * STEPS
    assert messages.NO_UNCOND in notes(model)


def test_where_skip_layer_guidance_ends_skipping_begins(tiny_models, plain):
    theirs = sample(skip_layers(tiny_models("sd3"), 0.4), "sd3")
    model = attach(skip_layers(tiny_models("sd3"), 0.4), EVERY_SECOND)
    result = sample(model, "sd3")
    full, change = full_at(model), first_after(model, 0.4)
    assert all(full[: change + 3]) and not all(full)
    assert 0 < relative(result, theirs) < 0.1 * relative(plain("sd3", 4), plain("sd3"))


def with_reuse(every, weight="constant", forecast="fitted"):
    """CFG-Cache once in `every` evaluations together with attention reuse at every second one."""
    return replace(cfg_cache(every, forecast=forecast), reuse=ReuseSettings({"self": Interval(2)}, weight))


class AttentionWatch:
    """Which branches went through the network in each call, and for how many of them attention ran."""

    def __init__(self, model):
        network = model.model.diffusion_model
        modules = tiny.self_attention(network)
        self.calls, self.ran = [], []
        layer = modules[0]
        linear = getattr(layer, "qkv", None) or layer.to_q
        self.hook = linear.register_forward_pre_hook(lambda _, args: self.ran.append(args[0].shape[0]))
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", self.apply_model)

    def apply_model(self, executor, *args, **kwargs):
        self.ran.clear()
        output = executor(*args, **kwargs)
        self.calls.append((sorted(args[5]["cond_or_uncond"]), sum(self.ran)))
        return output


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batched", "one by one"])
@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_after_a_gap_the_unconditional_branch_runs_with_full_attention(
    tiny_models, family, every, one_by_one, monkeypatch
):
    if one_by_one:
        monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    model = attach(tiny_models(family), with_reuse(every))
    watch = AttentionWatch(model)
    try:
        sample(model, family)
    finally:
        watch.hook.remove()
    with_uncond = [(branches, ran) for branches, ran in watch.calls if 1 in branches]
    alone = [ran for branches, ran in watch.calls if branches == [0]]
    assert len(with_uncond) == STEPS - estimates(model) and estimates(model) >= 6
    assert all(ran == len(branches) for branches, ran in with_uncond), "no attention from before the gap"
    assert 0 in alone, "the conditional branch does reuse its attention while it runs alone"


@pytest.mark.parametrize(
    "settings",
    [with_reuse(3, "hold", "hold"), CacheSettings("reuse", reuse=ReuseSettings({"self": Interval(3)}, "hold"))],
    ids=["with CFG-Cache", "reuse alone"],
)
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_no_branch_sees_what_another_one_left(tiny_models, family, settings, monkeypatch):
    """Steps without length: each branch's attention and output stay what they are, and differ between
    the branches. The host batches them now so, now so. Whatever crossed over would show."""
    calls, concat = [], comfy.samplers.can_concat_cond

    def now_and_then(a, b):
        calls.append(1)
        return a is b or (len(calls) % 3 == 0 and concat(a, b))

    sigmas = torch.tensor([0.5] * 9 + [0.3, 0.0])
    full = sample(tiny_models(family), family, sigmas=sigmas)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", now_and_then)
    model = attach(tiny_models(family), settings)
    held = sample(model, family, sigmas=sigmas)
    assert sum(n for action, n in evaluations(model).items() if action != "computed") >= 3
    monkeypatch.undo()
    swapped = sample(tiny_models(family), family, sigmas=sigmas, negative=conditioning(family, 1))
    assert relative(swapped, full) > 0.01, "the branches differ"
    assert relative(held, full) < 1e-4
