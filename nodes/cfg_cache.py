"""FasterCacheCFG: CFG-Cache alone, with all its knobs."""
from comfy_api.latest import io

from ..fastercache_core.guidance import WEIGHTS, GuidanceSettings
from ..fastercache_core.measured import FORECAST_NAMES
from ..fastercache_core.schedule import Interval
from ..fastercache_core.settings import CacheSettings
from .host.attach import attach
from .schema import advanced, schema, window, window_inputs


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
            inputs=[
                io.Model.Input("model", tooltip="The model to sample faster. It is not changed itself."),
                io.Int.Input("interval", default=2, min=1, max=20,
                             tooltip="Run the unconditional pass once in this many steps. 1 = never "
                                     "skip, 2 = safe, 5 = the paper's, needs many steps."),
                advanced(io.Combo.Input("forecast", options=list(FORECAST_NAMES), default="blend",
                                        tooltip="How the difference is carried forward: hold = as it was "
                                                "(paper), linear = along its last change, quadratic = along "
                                                "its curve, blend = one third linear, two thirds quadratic.")),
                advanced(io.Combo.Input("weights", options=list(WEIGHTS), default="none",
                                        tooltip="Extra weight for low and high frequencies of the difference: "
                                                "paper = equation 11, released = the published code, which "
                                                "compounds over skipped steps, none = as measured.")),
                *window_inputs(),
                advanced(io.Float.Input("radius", default=0.2, min=0.0, max=0.5, step=0.01,
                                        tooltip="Low frequencies: those within this fraction of the shorter "
                                                "latent side. Only used with weights.")),
                advanced(io.Float.Input("alpha_low", default=0.2, min=0.0, max=1.0, step=0.01,
                                        tooltip="Added weight of low frequencies. Only used with weights.")),
                advanced(io.Float.Input("alpha_high", default=0.2, min=0.0, max=1.0, step=0.01,
                                        tooltip="Added weight of high frequencies. Only used with weights.")),
                advanced(io.Float.Input("switch_percent", default=0.6, min=0.0, max=1.0, step=0.01,
                                        tooltip="Where the added weight moves from low to high frequencies "
                                                "(t0 of equation 11). Only used with weights.")),
            ],
            outputs=[io.Model.Output("cached_model", display_name="model",
                                     tooltip="The model with CFG-Cache, for any sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, interval, forecast, weights, start_percent, end_percent, radius,
                alpha_low, alpha_high, switch_percent):
        guidance = GuidanceSettings(
            Interval(interval, window("FasterCacheCFG", start_percent, end_percent)),
            forecast, weights, radius, alpha_low, alpha_high, switch_percent)
        settings = CacheSettings(f"CFG-Cache 1 in {interval}, {forecast}, weights {weights}", guidance)
        return io.NodeOutput(attach(model, settings, cls.hidden.unique_id))
