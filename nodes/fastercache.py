"""FasterCache: the one node most people need."""
from comfy_api.latest import io

from ..fastercache_core.guidance import GuidanceSettings
from ..fastercache_core.jump import JumpSettings
from ..fastercache_core.reuse import ReuseSettings
from ..fastercache_core.schedule import Interval
from ..fastercache_core.settings import CacheSettings
from .host.attach import attach
from .schema import schema, window, window_inputs


def exact_looking(span):
    """Unconditional pass estimated at every second step; everything else runs."""
    return CacheSettings("exact-looking", guidance=GuidanceSettings(Interval(2, span), "blend"))


def balanced(span):
    """Every second step forecast from the ones before."""
    return CacheSettings("balanced", guidance=GuidanceSettings(Interval(2, span), "blend"),
                         jump=JumpSettings(Interval(2, span), "blend"))


def fast(span):
    """Two of three steps forecast."""
    return CacheSettings("fast", guidance=GuidanceSettings(Interval(3, span), "blend"),
                         jump=JumpSettings(Interval(3, span), "blend"))


def paper(span):
    """FasterCache as published: attention reuse at every second step, CFG-Cache at four of five."""
    return CacheSettings("paper", guidance=GuidanceSettings(Interval(5, span), "hold", "paper"),
                         reuse=ReuseSettings(Interval(2, span), "linear", 1.0))


PRESETS = {"exact-looking": exact_looking, "balanced": balanced, "fast": fast, "paper": paper}


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
            inputs=[
                io.Model.Input("model", tooltip="The model to sample faster. It is not changed itself."),
                io.Combo.Input("preset", options=list(PRESETS), default="balanced",
                               tooltip="exact-looking = only the negative pass is skipped, at every second "
                                       "step; balanced = about half the work; fast = about 0.4 of it, visible "
                                       "changes possible; paper = FasterCache as published."),
                *window_inputs(),
            ],
            outputs=[io.Model.Output("cached_model", display_name="model",
                                     tooltip="The model with caching, for any sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, preset, start_percent, end_percent):
        settings = PRESETS[preset](window("FasterCache", start_percent, end_percent))
        return io.NodeOutput(attach(model, settings, cls.hidden.unique_id))
