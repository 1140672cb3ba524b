"""CFG-Cache alone, with all its knobs: FasterCacheCFG on a MODEL, FasterCacheGuider as a GUIDER."""
import comfy.samplers
from comfy_api.latest import io

from ..fastercache_core.guidance import WEIGHTS, GuidanceSettings
from ..fastercache_core.measured import FORECAST_NAMES
from ..fastercache_core.schedule import Interval
from ..fastercache_core.settings import CacheSettings
from .host.attach import attach
from .schema import advanced, choice, gate, name_of, schema, tolerance_input, window, window_inputs


def guidance_inputs():
    """The inputs that say how CFG-Cache skips and estimates."""
    return [
        io.Int.Input("interval", default=2, min=1, max=20,
                     tooltip="Run the unconditional pass once in this many steps. 1 = never "
                             "skip, 2 = safe, 5 = the paper's; fewer steps were better than that on our model."),
        tolerance_input(),
        advanced(io.Combo.Input("forecast", options=list(FORECAST_NAMES), default="measured",
                                tooltip="How the difference is carried forward: measured = as it was seen to "
                                        "move during this run, hold = as it was (paper), linear = along its "
                                        "last change, quadratic = along its curve, blend = one third linear, "
                                        "two thirds quadratic.")),
        advanced(io.Combo.Input("weights", options=list(WEIGHTS), default="none",
                                tooltip="Extra weight for low and high frequencies of the difference: "
                                        "paper = equation 11, released = the published code, which "
                                        "compounds over skipped steps, none = as forecast.")),
        *window_inputs(),
        advanced(io.Float.Input("radius", default=0.2, min=0.0, max=0.5, step=0.01,
                                tooltip="Low frequencies: those within this fraction of the shorter "
                                        "latent side.")),
        advanced(io.Int.Input("bands", default=2, min=1, max=8,
                              tooltip="Frequency bands that the forecast \"measured\" follows one by one.")),
        advanced(io.Float.Input("alpha_low", default=0.2, min=0.0, max=1.0, step=0.01,
                                tooltip="Added weight of low frequencies. Only used with weights.")),
        advanced(io.Float.Input("alpha_high", default=0.2, min=0.0, max=1.0, step=0.01,
                                tooltip="Added weight of high frequencies. Only used with weights.")),
        advanced(io.Float.Input("switch_percent", default=0.6, min=0.0, max=1.0, step=0.01,
                                tooltip="Where the added weight moves from low to high frequencies "
                                        "(t0 of equation 11). Only used with weights.")),
    ]


def with_cfg_cache(node, model, interval, tolerance, forecast, weights, start_percent, end_percent, radius,
                   bands, alpha_low, alpha_high, switch_percent):
    """`model` with CFG-Cache as the inputs of `node` (a class) say. Raises ValueError on what is not allowed."""
    span = window(name_of(node), start_percent, end_percent)
    choice(name_of(node), "forecast", forecast, FORECAST_NAMES)
    choice(name_of(node), "weights", weights, WEIGHTS)
    guidance = GuidanceSettings(Interval(interval, span), forecast, weights, radius, bands,
                                alpha_low, alpha_high, switch_percent)
    label = f"CFG-Cache 1 in {interval}, {forecast}, weights {weights}"
    return attach(model, CacheSettings(label, guidance, gate=gate(tolerance)), node.hidden.unique_id)


class FasterCacheCFG(io.ComfyNode):
    """Skips the unconditional pass on some evaluations and estimates its output."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCacheCFG",
            display_name="FasterCache CFG-Cache",
            description="Skips the unconditional (negative) pass on some steps and rebuilds it from the "
                        "conditional one and the known difference between the two. Works on every model "
                        "that is sampled with cfg above 1; saves up to half of each skipped step.",
            inputs=[io.Model.Input("model", tooltip="The model to sample faster. It is not changed itself."),
                    *guidance_inputs()],
            outputs=[io.Model.Output("cached_model", display_name="model",
                                     tooltip="The model with CFG-Cache, for any sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **choices):
        return io.NodeOutput(with_cfg_cache(cls, model, **choices))


class FasterCacheGuider(io.ComfyNode):
    """Classifier-free guidance with CFG-Cache, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCacheGuider",
            display_name="FasterCache Guider",
            description="A CFG guider for SamplerCustomAdvanced that skips the unconditional (negative) pass "
                        "on some steps and rebuilds it from the conditional one.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample faster. It is not changed itself."),
                io.Conditioning.Input("positive", tooltip="What you want to see."),
                io.Conditioning.Input("negative", tooltip="What you do not want to see."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance scale. At 1.0 there is no unconditional pass to skip."),
                *guidance_inputs(),
            ],
            outputs=[io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, **choices):
        guider = comfy.samplers.CFGGuider(with_cfg_cache(cls, model, **choices))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)
