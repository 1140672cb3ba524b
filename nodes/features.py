"""What nodes have in common that reuse features: which, how they are carried forward, and where they are cached."""

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..fastercache_core.clock import Interval, Window
from ..fastercache_core.features.reuse import REUSE_WEIGHTS, ReuseSettings
from ..fastercache_core.features.storage import DTYPES, StorageSettings
from .inputs import advanced, fraction
from .schema import Inputs, Node, wrong

WEIGHTS = ("as preset", "off", *REUSE_WEIGHTS)
DEVICES = {"same": None, "cpu": "cpu", "second gpu": "cuda:1"}
# w of eq. 5 where nothing is typed: half of the last change, which is its own speed; the paper's end of the ramp.
USUAL_W = {"constant": 0.5, "ramp": 1.0}

# Name of a depth -> {kind of feature: (times the interval, first, last part of sampling)}.
DEPTHS: dict[str, dict[str, tuple[int, float, float]]] = {
    "attention": {"self": (1, 0.0, 1.0), "temporal": (1, 0.0, 1.0)},
    "all attention": {"self": (1, 0.0, 1.0), "temporal": (1, 0.0, 1.0), "cross": (1, 0.0, 1.0)},
    "pyramid attention": {"self": (1, 0.15, 0.85), "temporal": (2, 0.15, 0.85), "cross": (3, 0.15, 0.85)},
    "half of the blocks": {"rear": (1, 0.0, 0.5), "front": (1, 0.5, 1.0)},
    "all blocks": {"stack": (1, 0.0, 1.0)},
    "inside of a UNet": {"deep": (1, 0.0, 1.0)},
}
AUTOMATIC = "automatic"
# Which depth saves most, as measured (docs/feature-reuse.md); "automatic" tries them in this order.
SAVING = ("all blocks", "inside of a UNet", "half of the blocks", "all attention", "attention")


def intervals(depth: str, span: Window, every: int = 2, part: Window = Window(0.0, 0.9)) -> dict[str, Interval]:
    """{kind of feature: Interval} of a depth: one evaluation in `every` computed, in a part of the window `span`.

    The part does not reach its end by itself: the last steps of flow models are so large that one evaluation with
    features from the cache costs more there than all others together.
    """
    length = span.end - span.start

    def inside(first: float, last: float) -> Window:
        start, end = max(first, part.start), min(last, part.end)
        return Window(span.start + start * length, span.start + max(start, end) * length)

    return {kind: Interval(every * times, inside(first, last)) for kind, (times, first, last) in DEPTHS[depth].items()}


def feature_inputs() -> list[io.Input]:
    """The inputs that say which features are reused and where they are cached."""
    weight = "Parts of the network are taken from the cache; how they are carried forward."
    depth = "Which parts are reused. automatic = those that save most and that memory can hold."
    return [
        advanced(io.Combo.Input("feature_reuse", options=list(WEIGHTS), default="as preset", tooltip=weight)),
        advanced(io.Combo.Input("reuse_depth", options=[AUTOMATIC, *DEPTHS], default=AUTOMATIC, tooltip=depth)),
        *storage_inputs(),
    ]


def reuse_inputs() -> list[io.Input]:
    """The knobs of feature reuse that the papers have, beside its depth."""
    every = "Compute reused parts once in this many steps (FasterCache: 2 or 3)."
    w = "How much of the last change is added (w of eq. 5). 0 = 0.5 if constant, 1 at a ramp's end."
    blocks = "Only so many blocks: of attention the first ones. 0 = all."
    return [
        advanced(io.Int.Input("reuse_interval", default=2, min=2, max=20, optional=True, tooltip=every)),
        optional(fraction("reuse_weight", 0.0, w, high=2.0)),
        optional(fraction("reuse_start_percent", 0.0, "No feature is reused before this part of the window.")),
        optional(fraction("reuse_end_percent", 0.9, "No feature is reused after this part of the window.")),
        advanced(io.Int.Input("reuse_blocks", default=0, min=0, max=1000, optional=True, tooltip=blocks)),
    ]


def optional(widget: io.WidgetInput) -> io.WidgetInput:
    """The same input, which programs may leave out."""
    widget.optional = True
    return widget


def storage_inputs() -> list[io.Input]:
    """The inputs that say where features are cached."""
    size = "Most memory for cached features, in GB. 0 = up to half of what is free."
    device = "Where features are cached: beside the model, in main memory (slower), on a second GPU."
    dtype = "Precision of cached features: fp16 = half the size of fp32, fp8 = smaller still."
    return [
        advanced(io.Float.Input("memory_gb", default=0.0, min=0.0, max=512.0, step=0.1, round=0.001, tooltip=size)),
        advanced(io.Combo.Input("memory_device", options=list(DEVICES), default="same", tooltip=device)),
        advanced(io.Combo.Input("memory_dtype", options=list(DTYPES), default="native", tooltip=dtype)),
    ]


def feature_settings(node: Node, inputs: Inputs, preset: ReuseSettings | None, span: Window) -> ReuseSettings | None:
    """ReuseSettings of a node's inputs, None for off; preset: the preset's. Raises ValueError on wrong inputs."""
    weight = inputs["feature_reuse"]
    depth = inputs["reuse_depth"]
    storage = storage_settings(node, inputs)
    if weight == "as preset":
        return preset and replace(preset, storage=storage)
    if weight == "off":
        return None
    part = Window(inputs.get("reuse_start_percent", 0.0), inputs.get("reuse_end_percent", 0.9))
    if part.start > part.end:
        says = f"reuse_start_percent is {part.start}, after reuse_end_percent {part.end}"
        raise wrong(node, f"{says}; it must be the same or smaller.")
    every, w = inputs.get("reuse_interval", 2), inputs.get("reuse_weight", 0.0) or USUAL_W.get(weight, 0.5)
    depths = tuple((name, intervals(name, span, every, part)) for name in SAVING) if depth == AUTOMATIC else ()
    chosen = intervals(SAVING[-1] if depths else depth, span, every, part)
    return ReuseSettings(chosen, weight, w, storage, depths, blocks=inputs.get("reuse_blocks", 0) or None)


def storage_settings(node: Node, inputs: Inputs) -> StorageSettings:
    """StorageSettings of a node's inputs. Raises ValueError on wrong inputs, and for a GPU that is not there."""
    dtype = inputs["memory_dtype"]
    device, count = inputs["memory_device"], torch.cuda.device_count()
    if device == "second gpu" and count < 2:
        machine = f"this machine has {count} GPU(s)"
        raise wrong(node, f"memory_device is 'second gpu', but {machine}; choose 'same' or 'cpu'.")
    return StorageSettings(int(inputs["memory_gb"] * 1e9) or None, DEVICES[device], dtype)
