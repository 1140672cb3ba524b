"""The nodes most people need: FasterCache on a MODEL, FasterCacheKSampler as a sampler."""
from dataclasses import replace
from functools import partial

import comfy.samplers
from comfy_api.latest import io
from nodes import common_ksampler

from ..fastercache_core.auto import AutoSettings
from ..fastercache_core.clock import Window
from ..fastercache_core.guidance import GuidanceSettings
from ..fastercache_core.jump import JumpSettings
from ..fastercache_core.report import full_text
from ..fastercache_core.reuse import ReuseSettings
from ..fastercache_core.schedule import Interval
from ..fastercache_core.settings import CacheSettings
from .features import feature_inputs, feature_settings
from .host.attach import attach, last_report
from .schema import advanced, choice, name_of, schema, window, window_inputs


# How close to full sampling the automatic presets stay, in dB PSNR: nine of ten pictures or more.
CLOSENESS = {"exact-looking": 50.0, "balanced": 42.0, "fast": 36.0}


def automatic(label, closeness, span):
    """Steps forecast from the ones before, as many as `closeness` (dB) allows."""
    return CacheSettings(label, GuidanceSettings(), jump=JumpSettings(), auto=AutoSettings(closeness, span))


def paper(span):
    """FasterCache as published: attention reuse at every second step, CFG-Cache at four of five."""
    late = Window(max(span.start, 1 / 3), span.end)
    return CacheSettings("paper", GuidanceSettings(Interval(5, late), "hold", "paper"),
                         ReuseSettings(dict.fromkeys(("self", "temporal"), Interval(2, span)), "linear", 1.0))


def nothing(span):
    """No step and no pass skipped; for feature reuse alone."""
    return CacheSettings("none")


PRESETS = {**{label: partial(automatic, label, closeness) for label, closeness in CLOSENESS.items()},
           "paper": paper, "none": nothing}


def preset_inputs():
    """The inputs that choose a preset and where it may skip."""
    return [
        io.Combo.Input("preset", options=list(PRESETS), default="balanced",
                       tooltip="How close the picture stays to full sampling: exact-looking = about 50 dB PSNR, no "
                               "difference to be seen; balanced = about 42 dB; fast = about 36 dB, small "
                               "changes; paper = FasterCache as published; none = only what "
                               "feature_reuse says."),
        advanced(io.Float.Input("closeness", default=0.0, min=0.0, max=80.0, step=1.0,
                                tooltip="How close the picture stays to full sampling, in dB PSNR: higher is "
                                        "closer and slower; below 30 counts as 30. 0 = as the preset says. Not used "
                                        "by paper and none.")),
        *window_inputs(),
        *feature_inputs(),
    ]


def with_preset(node, model, preset, closeness, start_percent, end_percent, **features):
    """`model` cached as the inputs of `node` (a class) say. Raises ValueError on what is not allowed."""
    span = window(name_of(node), start_percent, end_percent)
    settings = PRESETS[choice(name_of(node), "preset", preset, PRESETS)](span)
    if closeness and settings.auto:
        settings = automatic(f"{closeness:g} dB", closeness, span)
    reuse = feature_settings(name_of(node), settings.reuse, span, **features)
    return attach(model, replace(settings, reuse=reuse), node.hidden.unique_id)


class FasterCache(io.ComfyNode):
    """Samples faster by skipping what can be foreseen, and reports what was skipped."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCache",
            display_name="FasterCache",
            description="The same picture or video with fewer network passes: put it between the model "
                        "loader (and LoRAs) and the sampler. It skips what can be foreseen from the "
                        "steps before, never the last step, and says on the node and in the log what "
                        "was skipped and why not more.",
            inputs=[io.Model.Input("model", tooltip="The model to sample faster. It is not changed itself."),
                    *preset_inputs()],
            outputs=[io.Model.Output("cached_model", display_name="model",
                                     tooltip="The model with caching, for any sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **choices):
        return io.NodeOutput(with_preset(cls, model, **choices))


class FasterCacheKSampler(io.ComfyNode):
    """The host's KSampler with caching built in."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCacheKSampler",
            display_name="FasterCache KSampler",
            description="The KSampler with FasterCache built in, and a report of what was skipped.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. It is not changed itself."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Seed of the noise."),
                io.Int.Input("steps", default=20, min=1, max=10000,
                             tooltip="Steps of full sampling; the cache decides how many of them run."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance scale."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS,
                               tooltip="How the noise levels are spaced."),
                io.Conditioning.Input("positive", tooltip="What you want to see."),
                io.Conditioning.Input("negative", tooltip="What you do not want to see."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="1.0 = from pure noise; lower keeps more of the latent."),
                *preset_inputs(),
            ],
            outputs=[io.Latent.Output("latent", tooltip="The denoised latent."),
                     io.String.Output("report", tooltip="What was skipped, and why not more.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
                denoise, **choices):
        cached = with_preset(cls, model, **choices)
        (latent,) = common_ksampler(cached, seed, steps, cfg, sampler_name, scheduler, positive, negative,
                                    latent_image, denoise=denoise)
        report = last_report(cached)
        return io.NodeOutput(latent, full_text(report) if report else "nothing was sampled")
