"""The nodes most people need: FasterCache on a MODEL, FasterCacheKSampler as a sampler."""
from dataclasses import replace

import comfy.samplers
from comfy_api.latest import io
from nodes import common_ksampler

from ..fastercache_core.clock import Window
from ..fastercache_core.gate import GateSettings
from ..fastercache_core.guidance import GuidanceSettings
from ..fastercache_core.jump import JumpSettings
from ..fastercache_core.report import full_text
from ..fastercache_core.reuse import REUSE_WEIGHTS, ReuseSettings
from ..fastercache_core.schedule import Interval
from ..fastercache_core.settings import CacheSettings
from .host.attach import attach, last_report
from .schema import advanced, choice, schema, window, window_inputs


def exact_looking(span):
    """The unconditional pass estimated at every second step."""
    return CacheSettings("exact-looking", GuidanceSettings(Interval(2, span)), gate=GateSettings())


def balanced(span):
    """Every second step forecast from the ones before."""
    return CacheSettings("balanced", GuidanceSettings(Interval(2, span)),
                         jump=JumpSettings(Interval(2, span)), gate=GateSettings())


def fast(span):
    """Two of three steps forecast."""
    return CacheSettings("fast", GuidanceSettings(Interval(2, span)),
                         jump=JumpSettings(Interval(3, span)), gate=GateSettings())


def paper(span):
    """FasterCache as published: attention reuse at every second step, CFG-Cache at four of five."""
    late = Window(max(span.start, 1 / 3), span.end)
    return CacheSettings("paper", GuidanceSettings(Interval(5, late), "hold", "paper"),
                         ReuseSettings(Interval(2, span), "linear", 1.0))


def nothing(span):
    """No step and no pass skipped; for attention reuse alone."""
    return CacheSettings("none")


PRESETS = {"exact-looking": exact_looking, "balanced": balanced, "fast": fast, "paper": paper, "none": nothing}
ATTENTION = ("as preset", "off", *REUSE_WEIGHTS)


def preset_inputs():
    """The inputs that choose a preset and where it may skip."""
    return [
        io.Combo.Input("preset", options=list(PRESETS), default="balanced",
                       tooltip="exact-looking = only the negative pass is skipped, at every second "
                               "step; balanced = every second step, about half the work; fast = two of "
                               "three steps, visible changes possible; paper = FasterCache as published; "
                               "none = only what attention_reuse says."),
        *window_inputs(),
        advanced(io.Combo.Input("attention_reuse", options=list(ATTENTION), default="as preset",
                                tooltip="Attention outputs from the cache at every second step: hold = the last "
                                        "ones, constant = continued at half their last change, linear = the "
                                        "paper's growing weight. Saves part of a pass and costs memory; needs "
                                        "20 steps or more.")),
    ]


def with_preset(node, model, preset, start_percent, end_percent, attention_reuse):
    """`model` cached as the inputs of `node` (a class) say. Raises ValueError on what is not allowed."""
    span = window(node.__name__, start_percent, end_percent)
    choice(node.__name__, "attention_reuse", attention_reuse, ATTENTION)
    settings = PRESETS[choice(node.__name__, "preset", preset, PRESETS)](span)
    if attention_reuse != "as preset":
        settings = replace(settings, reuse=attention_settings(attention_reuse, span))
    return attach(model, settings, node.hidden.unique_id)


def attention_settings(weight, span):
    """How attention is reused at every second step, None for "off"."""
    if weight == "off":
        return None
    return ReuseSettings(Interval(2, span), weight, w=1.0 if weight == "linear" else 0.5)


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
