"""Video and audio in one packed latent: what is skipped, and what comes from the cache, on the host's LTXAVModel.

Older hosts do not have it: there, on a network of the tests' own with the same interface. Hosts without latents of
several parts run none of it.
"""

import functools
from dataclasses import replace

import comfy.conds
import comfy.ldm.lightricks.model
import comfy.model_base
import comfy.ops
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.ldm.common_dit import rms_norm
from comfy.ldm.modules.attention import optimized_attention
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.signal import DifferenceSettings
from fastercache_pack.nodes.fastercache import PRESETS, automatic
from fastercache_pack.nodes.host.families import find_family
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support import tiny
from support.features import (
    ATTENTION,
    BLOCKS,
    STILL,
    chosen_by_node,
    host_picture,
    reused_as_computed,
    reusing,
    shuffled_batches,
)
from support.guidance import cfg_cache, with_steps
from support.runs import actions, evaluations, notes, relative, totals
from support.tiny import SPECS, conditioning

nested_tensor = pytest.importorskip("comfy.nested_tensor", reason="this host has no latents of several parts")
NAME = "ltxav"
KINDS = ("self", "cross", "front", "rear", "stack")
VIDEO, AUDIO = (128, 3, 4, 4), (8, 6, 16)
WIDTHS = 32, 16
STEPS, FEWER = 20, 16
Linear = comfy.ops.disable_weight_init.Linear


class Attend(torch.nn.Module):
    """Attention of tokens to themselves or to others."""

    def __init__(self, width, others=None):
        super().__init__()
        self.q, self.kv, self.out = Linear(width, width), Linear(others or width, 2 * width), Linear(width, width)

    def forward(self, x, context=None, transformer_options=None):
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        return self.out(optimized_attention(self.q(x), k, v, 4, transformer_options=transformer_options))


class BasicAVTransformerBlock(torch.nn.Module):
    """Takes video and audio as one argument and adds to both in place, as the host's own does."""

    def __init__(self, v, a, context):
        super().__init__()
        self.attn1, self.audio_attn1 = Attend(v), Attend(a)
        self.attn2, self.audio_attn2 = Attend(v, context), Attend(a, context)
        self.audio_to_video_attn, self.video_to_audio_attn = Attend(v, a), Attend(a, v)
        self.ff, self.audio_ff = Linear(v, v), Linear(a, a)

    def forward(self, x, v_context=None, a_context=None, v_timestep=None, a_timestep=None, transformer_options=None):
        vx, ax = x
        options = {"transformer_options": transformer_options}
        vx += self.attn1(rms_norm(vx) * v_timestep, **options) * v_timestep
        vx += self.attn2(rms_norm(vx), v_context, **options)
        if ax.numel():
            ax += self.audio_attn1(rms_norm(ax) * a_timestep, **options) * a_timestep
            ax += self.audio_attn2(rms_norm(ax), a_context, **options)
            vx += self.audio_to_video_attn(rms_norm(vx), rms_norm(ax), **options)
            ax += self.video_to_audio_attn(rms_norm(ax), rms_norm(vx), **options)
            ax += self.audio_ff(rms_norm(ax)).tanh()
        vx += self.ff(rms_norm(vx)).tanh()
        return vx, ax


class LTXAVModel(comfy.ldm.lightricks.model.LTXVModel):
    """Named as the host's own, and derived from LTXV as it is, so that the entry for it must come first."""

    __module__ = "comfy.ldm.lightricks.av_model"

    def __init__(self, context, dtype=None, device=None, operations=None):
        torch.nn.Module.__init__(self)
        self.dtype = dtype
        v, a = WIDTHS
        self.into = torch.nn.ModuleList([Linear(VIDEO[0], v), Linear(AUDIO[0] * AUDIO[2], a)])
        self.time = torch.nn.ModuleList([Linear(1, v), Linear(1, a)])
        self.transformer_blocks = torch.nn.ModuleList(BasicAVTransformerBlock(v, a, context) for _ in range(3))
        self.out = torch.nn.ModuleList([Linear(v, VIDEO[0]), Linear(a, AUDIO[0] * AUDIO[2])])

    def forward(self, x, timestep, context, transformer_options=None, **kwargs):
        video, audio = x if isinstance(x, list) else (x, x.new_zeros(len(x), AUDIO[0], 0, AUDIO[2]))
        vx = self.into[0](video.flatten(2).mT)
        ax = self.into[1](audio.transpose(1, 2).flatten(2))
        v_time, a_time = (1 + layer(timestep.reshape(-1, 1, 1)).tanh() for layer in self.time)
        for block in self.transformer_blocks:
            vx, ax = block(
                (vx, ax),
                v_context=context,
                a_context=context,
                v_timestep=v_time,
                a_timestep=a_time,
                transformer_options=transformer_options,
            )
        vx = self.out[0](rms_norm(vx)).mT.reshape(video.shape)
        return [vx, self.out[1](rms_norm(ax)).unflatten(2, AUDIO[::2]).transpose(1, 2)] if ax.numel() else vx


class VideoAndAudio(comfy.model_base.LTXV):
    """Takes the packed latent apart, as the host's base class does for models that say of what it is made."""

    def __init__(self, model_config, device=None):
        comfy.model_base.BaseModel.__init__(self, model_config, comfy.model_base.ModelType.FLUX, device, LTXAVModel)

    def extra_conds(self, **kwargs):
        shapes = kwargs["latent_shapes"]
        packed = {"latent_shapes": comfy.conds.CONDConstant(shapes)} if len(shapes) > 1 else {}
        return {**super().extra_conds(**kwargs), **packed}


class TinyLTXAV(comfy.supported_models.LTXV):
    """What the host makes such a model of."""

    def get_model(self, state_dict, prefix="", device=None):
        return VideoAndAudio(self, device)


OURS = dict(cls="TinyLTXAV", cfg=dict(context=48), ctx=(20, 48), lat=VIDEO)
THEIRS = dict(
    cls="LTXAV",
    cfg=dict(
        image_model="ltxav",
        in_channels=VIDEO[0],
        audio_in_channels=AUDIO[0] * AUDIO[2],
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
    lat=VIDEO,
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The specification of the model, for as long as a test runs."""
    monkeypatch.setattr(comfy.supported_models, "TinyLTXAV", TinyLTXAV, raising=False)
    monkeypatch.setitem(SPECS, NAME, THEIRS if hasattr(comfy.supported_models, "LTXAV") else OURS)
    monkeypatch.setitem(BLOCKS, NAME, ["transformer_blocks"])
    monkeypatch.setitem(ATTENTION, NAME, {"self": r"attn1\.", "cross": r"attn2\.|_to_\w+_attn\."})


def sample(model, name=NAME, audio=True, batch=1, **options):
    """Sample video with audio (a nested latent, that the sampler sees packed) or without: [batch, elements]."""
    latent = torch.zeros(batch, *VIDEO)
    if audio:
        latent = nested_tensor.NestedTensor([latent, torch.zeros(batch, *AUDIO)])
    samples = tiny.sample(model, name, latent=latent, **options)
    return comfy.utils.pack_latents(samples.unbind() if samples.is_nested else [samples])[0].flatten(1)


def parts(latents, theirs):
    """How far the video and the audio, where there is any, are from `theirs`."""
    videos = torch.Size(VIDEO).numel()
    return [
        relative(latents[:, part], theirs[:, part])
        for part in (slice(videos), slice(videos, None))
        if theirs[:, part].numel()
    ]


@pytest.fixture(scope="module")
def full(tiny_models):
    """The host's own latents, with or without audio, and the layers of the network that run."""
    return functools.cache(
        lambda audio: host_picture(tiny_models(NAME), lambda model: sample(model, audio=audio, sigmas=STILL, batch=2))
    )


def test_the_latent_is_packed_and_all_of_its_parts_matter(tiny_models, full):
    """Otherwise nothing here would show anything."""
    theirs, _ = full(True)
    videos = torch.Size(VIDEO).numel()
    assert theirs.shape == (2, videos + torch.Size(AUDIO).numel())
    swapped = sample(tiny_models(NAME), sigmas=STILL, batch=2, negative=conditioning(NAME, 1))
    assert min(parts(swapped, theirs)) > 0.003, "guidance acts"
    assert min(parts(theirs[:1], theirs[1:])) > 0.01, "the two latents differ"
    assert relative(full(False)[0], theirs[:, :videos]) > 0.003, "the video hears the audio"
    hearing = [sum("audio" in layer and "transformer_blocks" in layer for layer in full(a)[1]) for a in (True, False)]
    assert hearing[0] > hearing[1] == 0


def test_it_has_an_entry_of_its_own(tiny_models):
    family = find_family(tiny_models(NAME).model.diffusion_model)
    assert family.name == "LTXV with audio" and family.kinds() == set(KINDS)


@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_reused_does_not_run_and_is_what_would_have_been_computed(tiny_models, full, monkeypatch, kind, audio):
    theirs, layers = full(audio)
    shuffled_batches(monkeypatch)
    reused_as_computed(tiny_models(NAME), NAME, kind, theirs, layers, functools.partial(sample, audio=audio), batch=2)


@pytest.mark.parametrize("audio", [True, False])
def test_storing_changes_nothing(tiny_models, full, audio):
    """Though the blocks add to their input in place."""
    for together in (KINDS[:-1], KINDS[-1:]):
        model = attach(tiny_models(NAME), reusing(*together, every=1))
        assert torch.equal(sample(model, audio=audio, sigmas=STILL, batch=2), full(audio)[0])
        assert last_report(model)["run"]["features"]["sites"] > 0, "it did store"


@pytest.mark.parametrize(
    "depth, forecast, dtype, audio",
    [
        ("automatic", "fitted", "native", True),
        ("automatic", "fitted", "fp8", True),
        ("automatic", "spaced", "fp8", False),
        ("all attention", "fitted", "fp8", False),
        ("all attention", "spaced", "fp16", True),
    ],
)
def test_forecasts_and_dtypes_stay_near_full_sampling(tiny_models, depth, forecast, dtype, audio):
    """An audio stream without elements is a feature too. The control is how far another seed's latent is."""
    model = attach(tiny_models(NAME), chosen_by_node(forecast=forecast, depth=depth, dtype=dtype))
    ours, theirs, other = (
        sample(m, steps=STEPS, audio=audio, seed=seed)
        for m, seed in ((model, 3), (tiny_models(NAME), 3), (tiny_models(NAME), 4))
    )
    assert evaluations(model)["reused"] >= 6
    assert last_report(model)["run"]["features"].get("depth", "all blocks") == "all blocks"
    for near, far in zip(parts(ours, theirs), parts(other, theirs)):
        assert 0 < near < 0.08 * far  # 0.04 on the tests' own network, 0.06 on the host's


SKIPPING = {
    "CFG-Cache, linear": (cfg_cache(forecast="linear"), "estimated", 8),
    "CFG-Cache, fitted": (cfg_cache(), "estimated", 8),
    "CFG-Cache, fitted in 5 bands": (replace(cfg_cache(), difference=DifferenceSettings(bands=5)), "estimated", 8),
    "CFG-Cache with a tolerance": (cfg_cache(3, tolerance=16e-3), "estimated", 6),
    "steps": (with_steps(), "predicted", 6),
    "automatic": (automatic("40 dB", 40.0, Window()), "predicted", 6),
}


@pytest.mark.parametrize("settings, action, least", SKIPPING.values(), ids=list(SKIPPING))
def test_skipping_is_nearer_to_full_sampling_than_fewer_steps_at_no_lower_cost(tiny_models, settings, action, least):
    """In the video and in the audio."""
    model = attach(tiny_models(NAME), settings)
    ours, theirs, fewer = (
        sample(m, steps=steps) for m, steps in ((model, STEPS), (tiny_models(NAME), STEPS), (tiny_models(NAME), FEWER))
    )
    assert evaluations(model).get(action, 0) >= least and totals(model)["cost"] <= FEWER / STEPS
    for near, far in zip(parts(ours, theirs), parts(fewer, theirs)):
        assert 0 < near < far


def test_a_sound_track_that_is_hard_to_predict_is_not_sacrificed_to_the_video(tiny_models, monkeypatch):
    """The error of each part counts by itself: in both together, that of the small sound track would hardly show.

    On the tests' own network, whose forecasts are accurate.
    """
    monkeypatch.setitem(SPECS, "own ltxav", OURS)
    videos = torch.Size(VIDEO).numel()

    def predicted(rough):
        def with_noise(apply_model, args):
            denoised = apply_model(args["input"], args["timestep"], **args["c"])
            noise = torch.Generator().manual_seed(round(1e4 * float(args["timestep"][0])))
            sound = denoised[..., videos:]
            noisy = sound + rough * torch.randn(sound.shape[1:], generator=noise)
            return torch.cat([denoised[..., :videos], noisy], -1)

        model = tiny_models("own ltxav")
        model.set_model_unet_function_wrapper(with_noise)
        model = attach(model, automatic("50 dB", 50.0, Window()))
        sample(model, "own ltxav", steps=STEPS)
        return evaluations(model).get("predicted", 0)

    assert predicted(0.5) < predicted(0.0) / 2


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_skips_or_says_why_it_did_not(tiny_models, preset):
    model = attach(tiny_models(NAME), PRESETS[preset](Window()))
    assert torch.isfinite(sample(model, steps=STEPS)).all()
    skipped = set(actions(model) + actions(model, "uncond")) - {"computed"}
    says_why = any(note.startswith("nothing was skipped") for note in notes(model))
    assert not skipped if preset == "none" else skipped or says_why
