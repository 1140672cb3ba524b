"""The ways of sampling of ComfyUI's own templates: guiders, sigmas by hand, two experts, 8-bit weights, speed LoRAs."""

import json
import re

import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_flux as flux_nodes
import comfy_extras.nodes_lt as lt_nodes
import pytest
import torch
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host.wrappers import attach, last_report

import nodes
from support import tiny
from support.features import chosen_by_node, told
from support.further import know_further
from support.guidance import lora
from support.runs import actions, evaluations, relative
from support.tiny import SPECS, conditioning

BALANCED, NONE = PRESETS["balanced"](Window()), PRESETS["none"](Window())
# Of the template for LTX-2.3.
BY_HAND = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
# Where forecasts are not accurate enough, in few steps or under guidance, features are reused all the same.
FEATURES = chosen_by_node()


def node(module, name):
    """A node of the host; skips where it has no such."""
    if not hasattr(module, name):
        pytest.skip(f"this ComfyUI has no {name}")
    return getattr(module, name)


def advanced(guider, sigmas, latent, seed=3):
    """SamplerCustomAdvanced with euler; the latent."""
    noise, sampler = custom.Noise_RandomNoise(seed), comfy.samplers.sampler_object("euler")
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, {"samples": latent})[0]["samples"]


def simple(model, steps):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def basic(model, name):
    return node(custom, "BasicGuider").execute(model, conditioning(name, 1))[0]


def cfg(model, name, scale=4.0):
    return node(custom, "CFGGuider").execute(model, conditioning(name, 1), conditioning(name, 2), scale)[0]


def dual_model(model, name):
    other = tiny.build(name, seed=9)
    return node(custom, "DualModelGuider").execute(model, conditioning(name, 1), 3.0, other, conditioning(name, 2))[0]


def by_hand(model, steps):
    return node(custom, "ManualSigmas").execute(BY_HAND)[0]


def for_flux2(model, steps):
    return node(flux_nodes, "Flux2Scheduler").execute(steps, 1024, 1024)[0]


# Way -> (family, guider, sigmas, settings under which something is skipped).
WAYS = {
    "BasicGuider": ("flux", basic, simple, BALANCED),
    "CFGGuider": ("flux", cfg, simple, FEATURES),
    "DualModelGuider": ("flux", dual_model, simple, FEATURES),
    "ManualSigmas": ("ltxv", lambda model, name: cfg(model, name, 1.0), by_hand, FEATURES),
    "Flux2Scheduler": ("flux2", basic, for_flux2, BALANCED),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_guider_or_sigmas_of_the_templates(tiny_models, monkeypatch, way):
    """Something is skipped, the picture stays, and off is the host's own to the bit."""
    know_further(monkeypatch)
    name, guider, sigmas, settings = WAYS[way]

    def run(model, seed=3):
        return advanced(guider(model, name), sigmas(model, 20), torch.zeros(1, *SPECS[name]["lat"]), seed)

    theirs, other = run(tiny_models(name)), run(tiny_models(name), seed=4)
    assert torch.equal(run(attach(tiny_models(name), NONE)), theirs)
    model = attach(tiny_models(name), settings)
    ours = run(model)
    skipped = set(actions(model)) - {"computed"}
    assert skipped, told(model)
    assert 0 < relative(ours, theirs) < 0.1 * relative(other, theirs)


def test_two_experts_of_ksampler_advanced(tiny_models):
    """As Wan 2.2: each half of the steps by its own model, each with a report of its own half."""
    latent = {"samples": torch.zeros(1, *SPECS["wan"]["lat"])}
    prompts = conditioning("wan", 1), conditioning("wan", 2)

    def run(high, low):
        sampler, how = nodes.KSamplerAdvanced(), (20, 3.5, "euler", "simple")
        [half] = sampler.sample(high, "enable", 3, *how, *prompts, latent, 0, 10, "enable")
        [whole] = sampler.sample(low, "disable", 0, *how, *prompts, half, 10, 10000, "disable")
        return whole["samples"]

    experts = tiny_models("wan"), tiny.build("wan", seed=9)
    theirs = run(*experts)
    assert torch.equal(run(*(attach(expert, NONE) for expert in experts)), theirs)
    cached = [attach(expert, BALANCED) for expert in experts]
    ours = run(*cached)
    assert [len(last_report(model)["evaluations"]) for model in cached] == [10, 10]
    assert any(evaluations(model).get("predicted", 0) for model in cached), [told(model) for model in cached]
    assert relative(ours, theirs) < 0.05


def in_8_bits(name):
    """A model whose weights are float8, and are widened as they are used."""
    config = getattr(comfy.supported_models, SPECS[name]["cls"])(tiny._config(name))
    config.unet_config.update(tiny._config(name))
    config.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
    model = config.get_model({}, "")
    tiny.random_weights(model.diffusion_model, 0)
    assert torch.float8_e4m3fn in {p.dtype for p in model.diffusion_model.parameters()}
    return comfy.model_patcher.ModelPatcher(model, load_device=tiny.CPU, offload_device=tiny.CPU)


def in_int8(name):
    """A model of int8 weights that were rotated before ("convrot"), as a file of the templates holds them."""
    layouts = pytest.importorskip("comfy.quant_ops")
    layout = node(layouts, "TensorWiseINT8Layout")
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    weights = {}
    for key, value in tiny.build(name).model.diffusion_model.state_dict().items():
        weights[key] = value
        if re.search(r"blocks.*(attn|ffn).*weight$", key) and value.ndim == 2:
            how = dict(is_weight=True, per_channel=True, convrot=True, convrot_groupsize=64)
            weights[key], params = layout.quantize(value, **how)
            weights[key + "_scale"] = params.scale
            written = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
            weights[key.removesuffix("weight") + "comfy_quant"] = written
    config = getattr(comfy.supported_models, SPECS[name]["cls"])(tiny._config(name))
    config.set_inference_dtype(torch.float32, None)
    config.quant_config = {"mixed_ops": True}
    model = config.get_model({}, "")
    assert not model.diffusion_model.load_state_dict(weights, strict=False).unexpected_keys
    assert any(getattr(m, "quant_format", None) == "int8_tensorwise" for m in model.diffusion_model.modules())
    return comfy.model_patcher.ModelPatcher(model, load_device=tiny.CPU, offload_device=tiny.CPU)


@pytest.mark.parametrize("settings", [BALANCED, FEATURES], ids=["steps", "features"])
@pytest.mark.parametrize("weights", [in_8_bits, in_int8], ids=["fp8", "int8 convrot"])
def test_weights_in_8_bits(weights, settings):
    model = weights("wan")
    theirs, other = (tiny.sample(model, "wan", steps=20, seed=seed) for seed in (3, 4))
    assert torch.isfinite(theirs).all()
    assert torch.equal(tiny.sample(attach(model, NONE), "wan", steps=20), theirs)
    model = attach(model, settings)
    ours = tiny.sample(model, "wan", steps=20)
    assert set(actions(model)) - {"computed"}, told(model)
    assert 0 < relative(ours, theirs) < 0.1 * relative(other, theirs)


def test_a_lora_for_few_steps_without_guidance(tiny_models):
    """cfg 1 and 8 steps: features are reused, and the LoRA acts."""
    few = dict(steps=8, cfg=1.0)
    fast = comfy.sd.load_lora_for_models(tiny_models("wan"), None, lora(tiny_models("wan")), 1.0, 0.0)[0]
    theirs = tiny.sample(fast, "wan", **few)
    assert relative(tiny.sample(tiny_models("wan"), "wan", **few), theirs) > 0.003
    model = attach(fast, FEATURES)
    ours = tiny.sample(model, "wan", **few)
    assert "reused" in actions(model), told(model)
    assert 0 < relative(ours, theirs) < 0.1 * relative(tiny.sample(fast, "wan", seed=4, **few), theirs)


def test_video_and_sound_with_a_cfg_of_their_own(tiny_models, monkeypatch):
    """LTXVDualCFGGuider: each scale guides its part where a negative pass is estimated, too."""
    guider = node(lt_nodes, "LTXVDualCFGGuider")
    from comfy.nested_tensor import NestedTensor
    from comfy.utils import pack_latents

    monkeypatch.setitem(SPECS, "ltxav", AV)

    def run(model, seed=3):
        latent = NestedTensor([torch.zeros(1, *AV["lat"]), torch.zeros(1, 8, 6, 16)])
        made = guider.execute(model, conditioning("ltxav", 1), conditioning("ltxav", 2), 3.0, 7.0)[0]
        return pack_latents(advanced(made, simple(model, 20), latent, seed).unbind())[0]

    theirs, other = run(tiny_models("ltxav")), run(tiny_models("ltxav"), 4)
    assert torch.equal(run(attach(tiny_models("ltxav"), NONE)), theirs)
    model = attach(tiny_models("ltxav"), BALANCED)
    ours = run(model)
    assert set(actions(model)) - {"computed"}, told(model)
    videos = torch.Size(AV["lat"]).numel()
    for part in (slice(videos), slice(videos, None)):
        assert relative(ours[..., part], theirs[..., part]) < 0.1 * relative(other[..., part], theirs[..., part])


AV = dict(
    cls="LTXAV",
    cfg=dict(
        image_model="ltxav",
        in_channels=128,
        audio_in_channels=128,
        cross_attention_dim=64,
        audio_cross_attention_dim=64,
        attention_head_dim=16,
        audio_attention_head_dim=16,
        num_attention_heads=4,
        audio_num_attention_heads=4,
        caption_channels=48,
        num_layers=3,
    ),
    ctx=(20, 96),
    lat=(128, 3, 4, 4),
)
