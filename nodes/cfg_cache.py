"""CFG-Cache alone, with all its settings: FasterCacheCFG on a MODEL, FasterCacheGuider as a GUIDER."""

from dataclasses import replace
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..fastercache_core.clock import Interval
from ..fastercache_core.controllers.interval import IntervalSettings
from ..fastercache_core.forecast import FORECASTERS
from ..fastercache_core.paper_weights import WEIGHTS
from ..fastercache_core.published import PUBLISHED, RELEASED
from ..fastercache_core.settings import CacheSettings
from ..fastercache_core.signal import DifferenceSettings
from .host.wrappers import attach
from .inputs import advanced, cfg_input, fraction, model_input, model_output, prompt_inputs, window_inputs
from .schema import WITH_ID, Inputs, Node, schema, window

TOLERANCE = 0.016  # of a skipped step, as measured


def guidance_inputs() -> list[io.Input]:
    """The inputs that say how CFG-Cache skips and estimates."""
    interval = "Run the negative pass once in this many steps. 2 is safe, 5 is the paper's."
    bands = "Frequency bands that the forecasts fitted and hedged tell apart."
    fine = dict(step=0.001, round=0.0001)
    tolerance = "Skip where the estimated error of a step is below this fraction. 0 = follow the interval."
    forecast = "How the difference is predicted: fitted to this run, held (paper) or extrapolated."
    weights = "Extra weight for low and high frequencies of the difference, as published."
    switch = "Where the added weight moves from low to high frequencies. Only used with paper."
    released = "Whose factors, windows and radius the weights released take: each script has its own."
    return [
        io.Int.Input("interval", default=2, min=1, max=20, tooltip=interval),
        advanced(io.Float.Input("tolerance", default=TOLERANCE, min=0.0, max=1.0, **fine, tooltip=tolerance)),
        advanced(io.Combo.Input("forecast", options=list(FORECASTERS), default="fitted", tooltip=forecast)),
        advanced(io.Combo.Input("weights", options=list(WEIGHTS), default="none", tooltip=weights)),
        *window_inputs(),
        fraction("radius", 0.2, "Low frequencies: those within this fraction of the shorter latent side.", high=0.5),
        advanced(io.Int.Input("bands", default=2, min=1, max=8, tooltip=bands)),
        fraction("alpha_low", 0.2, "Added weight of low frequencies. Only used with paper."),
        fraction("alpha_high", 0.2, "Added weight of high frequencies. Only used with paper."),
        fraction("switch_percent", 0.6, switch),
        advanced(io.Combo.Input("released", options=RELEASED, default=RELEASED[0], optional=True, tooltip=released)),
    ]


def difference_settings(node: Node, inputs: Inputs) -> DifferenceSettings:
    """How the difference is carried forward and weighed, as the inputs of `node` say."""
    forecast, weights = inputs["forecast"], inputs["weights"]
    row = inputs.get("released", RELEASED[0])
    if weights == "released":
        return replace(PUBLISHED[row].difference, forecast=forecast)
    shape = (inputs[name] for name in ("radius", "bands", "alpha_low", "alpha_high", "switch_percent"))
    return DifferenceSettings(forecast, weights, *shape)


def with_cfg_cache(node: Node, model: ModelPatcher, inputs: Inputs) -> ModelPatcher:
    """`model` with CFG-Cache as the inputs of `node` say. Raises ValueError on wrong inputs."""
    interval, difference = Interval(inputs["interval"], window(node, inputs)), difference_settings(node, inputs)
    label = f"CFG-Cache 1 in {interval.every}, {difference.forecast}, weights {difference.weights}"
    controller = IntervalSettings(estimate=interval, tolerance=inputs["tolerance"] or None)
    settings = CacheSettings(label, controller, difference, node=node.define_schema().display_name)
    return attach(model, settings, node.hidden.unique_id)


class FasterCacheCFG(io.ComfyNode):
    """Skips the negative (unconditional) pass at some steps and estimates it from the positive one and the predicted
    difference between the two. Works on every model that is sampled with cfg above 1; saves up to half of each such
    step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [model_input(), *guidance_inputs()]
        outputs = [model_output("The model with CFG-Cache, for any sampler.")]
        return schema(cls, "FasterCacheCFG", "FasterCache CFG-Cache", inputs, outputs, hidden=WITH_ID)

    @classmethod
    def execute(cls, model: ModelPatcher, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(with_cfg_cache(cls, model, inputs))


class FasterCacheGuider(io.ComfyNode):
    """A CFG guider for SamplerCustomAdvanced that skips the negative (unconditional) pass at some steps and estimates
    it from the positive one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [model_input(), *prompt_inputs(), cfg_input(5.0), *guidance_inputs()]
        outputs = [io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced.")]
        return schema(cls, "FasterCacheGuider", "FasterCache Guider", inputs, outputs, hidden=WITH_ID)

    @classmethod
    def execute(cls, model: ModelPatcher, **inputs: Any) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(with_cfg_cache(cls, model, inputs))
        guider.set_conds(inputs["positive"], inputs["negative"])
        guider.set_cfg(inputs["cfg"])
        return io.NodeOutput(guider)
