"""FasterCacheKSampler: the KSampler with a method of this pack built in, and a report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from nodes import common_ksampler

from ..fastercache_core.calibration.policy import Policy
from ..fastercache_core.clock import Interval, Window
from ..fastercache_core.controllers.interval import IntervalSettings
from ..fastercache_core.controllers.planned import MIXINGS, MixSettings
from ..fastercache_core.features.storage import StorageSettings
from ..fastercache_core.published import GUIDED, published_guidance
from ..fastercache_core.report import full_text
from ..fastercache_core.settings import CacheSettings
from ..fastercache_core.signal import DifferenceSettings
from .cfg_cache import TOLERANCE
from .fastercache import CLOSENESS, adaptive_settings, closeness_input, learning_inputs, published_input
from .frdiff import checked_policy, frdiff_settings, policy_settings
from .host.wrappers import attach, last_report
from .inputs import denoise_input, model_input, prompt_inputs, sampler_inputs, shown_with, window_inputs
from .kinds import CachePolicy
from .schema import WITH_ID, Inputs, Node, schema, window, wrong

# In the order of the host's function.
SAMPLING = ("seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image")
AUTOMATIC, MEASURED, PUBLISHED = "automatic", "CFG-Cache as measured", "CFG-Cache as published"
FRDIFF, POLICY = "FRDiff", "policy"


@dataclass(frozen=True)
class Asked:
    """What a node was asked for: itself, the model, its inputs and the part of sampling."""

    node: Node
    model: ModelPatcher
    inputs: Inputs
    span: Window


def _automatic(asked: Asked) -> CacheSettings:
    if asked.inputs.get("policy") is not None:
        return _policy(asked)
    return adaptive_settings(asked.inputs["preset"], asked.inputs, asked.span)


def _measured(asked: Asked) -> CacheSettings:
    interval = Interval(asked.inputs["interval"], asked.span)
    controller = IntervalSettings(estimate=interval, tolerance=TOLERANCE)
    return CacheSettings(f"CFG-Cache 1 in {interval.every}, fitted", controller, DifferenceSettings())


def _published(asked: Asked) -> CacheSettings:
    row = asked.inputs.get("published", GUIDED[0])
    return published_guidance(row, asked.span)


def _frdiff(asked: Asked) -> CacheSettings:
    mixing = asked.inputs["score_mixing"]
    return frdiff_settings(MixSettings(asked.inputs["interval"], mixing, window=asked.span), StorageSettings())


def _policy(asked: Asked) -> CacheSettings:
    policy: Policy | None = asked.inputs.get("policy")
    if policy is None:
        raise wrong(asked.node, "the method is 'policy', but the input policy is not connected; connect one.")
    return policy_settings(checked_policy(asked.node, asked.model, policy), StorageSettings())


METHODS: dict[str, Callable[[Asked], CacheSettings]] = {
    AUTOMATIC: _automatic,
    MEASURED: _measured,
    PUBLISHED: _published,
    FRDIFF: _frdiff,
    POLICY: _policy,
}


def method_inputs() -> list[io.Input]:
    """The inputs that choose a method, and those of every method, which the page shows with it."""
    method = "What is skipped. What is on the model already stays, and counts where both say the same."
    preset = "Closeness to full sampling: exact-looking 50 dB PSNR, balanced 42, fast 36 (small changes)."
    interval = "One in this many steps is computed in full; with CFG-Cache the others skip the negative pass."
    mixing = "What the steps between do: as in the paper, or hold scores, or reuse features throughout."
    start, end = window_inputs()
    inputs = {
        "preset": io.Combo.Input("preset", options=list(CLOSENESS), default="balanced", tooltip=preset),
        "closeness": closeness_input(),
        "interval": io.Int.Input("interval", default=2, min=1, max=20, tooltip=interval),
        "published": published_input(GUIDED, "Whose published CFG-Cache; paper is the text's own."),
        "score_mixing": io.Combo.Input("score_mixing", options=list(MIXINGS), default="paper", tooltip=mixing),
        "start": start,
        "end": end,
    }
    window_methods = [name for name in METHODS if name != POLICY]
    shown = {"preset": [AUTOMATIC], "closeness": [AUTOMATIC], "interval": [MEASURED, FRDIFF], "published": [PUBLISHED]}
    shown |= {"score_mixing": [FRDIFF], "start": window_methods, "end": window_methods}
    return [
        io.Combo.Input("method", options=list(METHODS), default=AUTOMATIC, tooltip=method),
        *(shown_with(widget, shown[name]) for name, widget in inputs.items()),
        *(shown_with(widget, [AUTOMATIC]) for widget in learning_inputs()),
    ]


class FasterCacheKSampler(io.ComfyNode):
    """The KSampler that knows CFG-Cache and the other methods of this pack, keeps what nodes before it put on the
    model, and reports what was skipped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        policy = "From FasterCache Auto-FR or a file; for the methods policy and automatic."
        inputs = [
            model_input(),
            *sampler_inputs((1, 30, 10000), cfg=5.0),
            *prompt_inputs(),
            io.Latent.Input("latent_image", tooltip="The latent to denoise."),
            denoise_input(),
            *method_inputs(),
            CachePolicy.Input("policy", optional=True, tooltip=policy),
        ]
        outputs = [
            io.Latent.Output("latent", tooltip="The denoised latent."),
            io.String.Output("report", tooltip="What was skipped, and why not more."),
        ]
        return schema(cls, "FasterCacheKSampler", "FasterCache KSampler", inputs, outputs, hidden=WITH_ID)

    @classmethod
    def execute(cls, model: ModelPatcher, **inputs: Any) -> io.NodeOutput:
        method = inputs["method"]
        if inputs.get("policy") is not None and method not in (AUTOMATIC, POLICY):
            way_out = "choose the method 'policy' or 'automatic', or disconnect it"
            raise wrong(cls, f"a policy is connected, but the method is {method!r}; {way_out}.")
        settings = METHODS[method](Asked(cls, model, inputs, window(cls, inputs)))
        settings = replace(settings, node="FasterCache KSampler")
        cached = attach(model, settings, cls.hidden.unique_id, keeps=True)
        (latent,) = common_ksampler(cached, *(inputs[name] for name in SAMPLING), denoise=inputs["denoise"])
        report = last_report(cached)
        return io.NodeOutput(latent, full_text(report) if report else "nothing was sampled")
