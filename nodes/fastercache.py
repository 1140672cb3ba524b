"""The nodes most people need: FasterCache on a MODEL, FasterCacheKSampler as a sampler."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from nodes import common_ksampler

from ..fastercache_core.clock import Interval, Window
from ..fastercache_core.controllers.adaptive import AdaptiveSettings
from ..fastercache_core.controllers.interval import IntervalSettings
from ..fastercache_core.features.reuse import ReuseSettings
from ..fastercache_core.report import full_text
from ..fastercache_core.settings import CacheSettings
from ..fastercache_core.signal import DifferenceSettings, OutputSettings
from .features import feature_inputs, feature_settings
from .host.wrappers import attach, last_report
from .inputs import advanced, denoise_input, model_input, model_output, prompt_inputs, sampler_inputs, window_inputs
from .schema import WITH_ID, Inputs, Node, choice, schema, window

# Target PSNR of the adaptive presets in dB: nine of ten pictures are closer.
CLOSENESS = {"exact-looking": 50.0, "balanced": 42.0, "fast": 36.0}
# In the order of the host's function.
SAMPLING = ("seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image")


def automatic(label: str, closeness: float, span: Window) -> CacheSettings:
    """As many steps predicted as a target PSNR of `closeness` dB allows."""
    return CacheSettings(label, AdaptiveSettings(closeness, span), DifferenceSettings(), OutputSettings())


def paper(span: Window) -> CacheSettings:
    """FasterCache as published: attention reuse at every second step, CFG-Cache at four of five."""
    estimate = Interval(5, Window(max(span.start, 1 / 3), span.end))
    reuse = ReuseSettings(dict.fromkeys(("self", "temporal"), Interval(2, span)), "ramp", 1.0)
    controller, difference = IntervalSettings(estimate=estimate), DifferenceSettings("hold", "paper")
    return CacheSettings("paper", controller, difference, reuse=reuse)


PRESETS: dict[str, Callable[[Window], CacheSettings]] = {
    **{label: partial(automatic, label, closeness) for label, closeness in CLOSENESS.items()},
    "paper": paper,
    "none": lambda span: CacheSettings("none"),  # for feature reuse alone
}


def preset_inputs() -> list[io.Input]:
    """The inputs that choose a preset and where it may skip."""
    preset = "Closeness to full sampling: exact-looking 50 dB PSNR, balanced 42, fast 36 (small changes)."
    closeness = "Target PSNR to full sampling in dB, in place of the preset's. 0 = as the preset says."
    learn = "Sample in full as well, and learn from both what may be skipped on this model. Slower."
    found = "Use a policy that Auto-FR found for exactly this model, sampler and steps."
    return [
        io.Combo.Input("preset", options=list(PRESETS), default="balanced", tooltip=preset),
        advanced(io.Float.Input("closeness", default=0.0, min=0.0, max=80.0, step=1.0, tooltip=closeness)),
        *window_inputs(),
        *feature_inputs(),
        advanced(io.Boolean.Input("learn", default=False, optional=True, tooltip=learn)),
        advanced(io.Boolean.Input("found_policy", default=True, optional=True, tooltip=found)),
    ]


def with_preset(node: Node, model: ModelPatcher, inputs: Inputs) -> ModelPatcher:
    """`model` cached as the inputs of `node` say. Raises ValueError on wrong inputs."""
    span, closeness = window(node, inputs), inputs["closeness"]
    settings = PRESETS[choice(node, inputs, "preset", PRESETS)](span)
    if closeness and isinstance(settings.controller, AdaptiveSettings):
        settings = automatic(f"{closeness:g} dB", closeness, span)
    reuse = feature_settings(node, inputs, settings.reuse, span)
    learn = inputs.get("learn", False)
    found = inputs.get("found_policy", True) and not learn and span == Window() and takes_found(settings)
    return attach(model, replace(settings, reuse=reuse, learn=learn, found=found), node.hidden.unique_id)


def takes_found(settings: CacheSettings) -> bool:
    """True where a policy of unknown closeness may decide in place of the settings' own target."""
    controller = settings.controller
    return isinstance(controller, AdaptiveSettings) and controller.target <= CLOSENESS["balanced"]


class FasterCache(io.ComfyNode):
    """The same picture or video with fewer network passes: put it between the model loader (and LoRAs) and the sampler.

    It skips what can be predicted from the steps before, and says on the node and in the log what
    was skipped and why not more.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [model_input(), *preset_inputs()]
        outputs = [model_output("The model with caching, for any sampler.")]
        return schema(cls, "FasterCache", "FasterCache", inputs, outputs, hidden=WITH_ID)

    @classmethod
    def execute(cls, model: ModelPatcher, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(with_preset(cls, model, inputs))


class FasterCacheKSampler(io.ComfyNode):
    """The KSampler with FasterCache built in, and a report of what was skipped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            model_input(),
            *sampler_inputs((1, 20, 10000), cfg=8.0),
            *prompt_inputs(),
            io.Latent.Input("latent_image", tooltip="The latent to denoise."),
            denoise_input(),
            *preset_inputs(),
        ]
        outputs = [
            io.Latent.Output("latent", tooltip="The denoised latent."),
            io.String.Output("report", tooltip="What was skipped, and why not more."),
        ]
        return schema(cls, "FasterCacheKSampler", "FasterCache KSampler", inputs, outputs, hidden=WITH_ID)

    @classmethod
    def execute(cls, model: ModelPatcher, **inputs: Any) -> io.NodeOutput:
        cached = with_preset(cls, model, inputs)
        (latent,) = common_ksampler(cached, *(inputs[name] for name in SAMPLING), denoise=inputs["denoise"])
        report = last_report(cached)
        return io.NodeOutput(latent, full_text(report) if report else "nothing was sampled")
