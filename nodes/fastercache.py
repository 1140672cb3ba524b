"""The node most people need: FasterCache on a MODEL."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..fastercache_core import messages
from ..fastercache_core.clock import Window
from ..fastercache_core.controllers.adaptive import AdaptiveSettings
from ..fastercache_core.published import PAPER, PUBLISHED, published, row_for
from ..fastercache_core.settings import CacheSettings
from ..fastercache_core.signal import DifferenceSettings, OutputSettings
from .features import AUTOMATIC, feature_inputs, feature_settings, reuse_inputs
from .host.families import family_of
from .host.wrappers import attach
from .inputs import advanced, model_input, model_output, window_inputs
from .schema import WITH_ID, Inputs, Node, schema, window

# Target PSNR of the adaptive presets in dB: nine of ten pictures are closer.
CLOSENESS = {"exact-looking": 50.0, "balanced": 42.0, "fast": 36.0}


def automatic(label: str, closeness: float, span: Window) -> CacheSettings:
    """As many steps predicted as a target PSNR of `closeness` dB allows."""
    return CacheSettings(label, AdaptiveSettings(closeness, span), DifferenceSettings(), OutputSettings())


PRESETS: dict[str, Callable[[Window], CacheSettings]] = {
    **{label: partial(automatic, label, closeness) for label, closeness in CLOSENESS.items()},
    "paper": partial(published, PAPER),
    "none": lambda span: CacheSettings("none"),  # for feature reuse alone
}


def closeness_input() -> io.Input:
    """The target of the adaptive presets as a number."""
    closeness = "Target PSNR to full sampling in dB, in place of the preset's. 0 = as the preset says."
    return advanced(io.Float.Input("closeness", default=0.0, min=0.0, max=80.0, step=1.0, tooltip=closeness))


def learning_inputs() -> list[io.Input]:
    """What a run may learn, and what it may know of earlier ones."""
    learn = "Sample in full as well, and learn from both what may be skipped on this model. Slower."
    found = "Use a policy that Auto-FR found for exactly this model, sampler and steps."
    return [
        advanced(io.Boolean.Input("learn", default=False, optional=True, tooltip=learn)),
        advanced(io.Boolean.Input("found_policy", default=True, optional=True, tooltip=found)),
    ]


def published_input(names: list[str], tooltip: str) -> io.Input:
    """The row of published settings that counts, by the name of its model."""
    return advanced(io.Combo.Input("published", options=names, default=names[0], optional=True, tooltip=tooltip))


def preset_inputs() -> list[io.Input]:
    """The inputs that choose a preset and where it may skip."""
    preset = "Closeness to full sampling: exact-looking 50 dB PSNR, balanced 42, fast 36 (small changes)."
    row = "Whose published settings the preset paper takes. automatic = those for this model, if any."
    return [
        io.Combo.Input("preset", options=list(PRESETS), default="balanced", tooltip=preset),
        closeness_input(),
        *window_inputs(),
        *feature_inputs(),
        *learning_inputs(),
        *reuse_inputs(),
        published_input([AUTOMATIC, *PUBLISHED], row),
    ]


def adaptive_settings(label: str, inputs: Inputs, span: Window) -> CacheSettings:
    """The adaptive preset `label`, or the closeness that is typed in its place."""
    closeness, learn = inputs["closeness"], inputs.get("learn", False)
    settings = automatic(f"{closeness:g} dB", closeness, span) if closeness else PRESETS[label](span)
    found = inputs.get("found_policy", True) and not learn and span == Window() and takes_found(settings)
    return replace(settings, learn=learn, found=found)


def paper_settings(node: Node, model: ModelPatcher, inputs: Inputs, span: Window) -> CacheSettings:
    """The published settings that are chosen, or those for the family of `model`."""
    row = inputs.get("published", AUTOMATIC)
    family = family_of(model).name
    name = row_for(family) if row == AUTOMATIC else row
    note = messages.takes_row(name, PUBLISHED[name].source, family if row == AUTOMATIC else None)
    return replace(published(name, span), notes=(note,))


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
        span, preset = window(cls, inputs), inputs["preset"]
        if preset == "paper":
            settings = paper_settings(cls, model, inputs, span)
        else:
            settings = adaptive_settings(preset, inputs, span) if preset in CLOSENESS else PRESETS[preset](span)
        reuse = feature_settings(cls, inputs, settings.reuse, span)
        settings = replace(settings, reuse=reuse, node="FasterCache")
        return io.NodeOutput(attach(model, settings, cls.hidden.unique_id))
