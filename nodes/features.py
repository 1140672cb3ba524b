"""What nodes have in common that reuse features: which, how they are carried forward, and where they are cached."""

from collections.abc import Callable
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..fastercache_core.clock import Interval, Window
from ..fastercache_core.features.reuse import REUSE_WEIGHTS, ReuseSettings
from ..fastercache_core.features.storage import DTYPES, StorageSettings
from .inputs import advanced
from .schema import Inputs, Node, choice, wrong

WEIGHTS = ("as preset", "off", *REUSE_WEIGHTS)
DEVICES = {"same": None, "cpu": "cpu", "second gpu": "cuda:1"}


def part(span: Window, start: float = 0.0, end: float = 0.9) -> Window:
    """The part of a window between two fractions of it."""
    length = span.end - span.start
    return Window(span.start + start * length, span.start + end * length)


def pyramid(span: Window) -> dict[str, Interval]:
    """PAB (arXiv 2408.12588): in the middle of sampling, the less often the less a kind of attention changes there."""
    return {kind: Interval(n, part(span, 0.15, 0.85)) for kind, n in {"self": 2, "temporal": 4, "cross": 6}.items()}


# Name of a depth -> {kind of feature: Interval}, inside a window. None reaches its end: the last steps of flow models
# are so large that one evaluation with features from the cache costs more there than all others together.
DEPTHS: dict[str, Callable[[Window], dict[str, Interval]]] = {
    "attention": lambda span: dict.fromkeys(("self", "temporal"), Interval(2, part(span))),
    "all attention": lambda span: dict.fromkeys(("self", "temporal", "cross"), Interval(2, part(span))),
    "pyramid attention": pyramid,
    "half of the blocks": lambda s: {"rear": Interval(2, part(s, 0.0, 0.5)), "front": Interval(2, part(s, 0.5, 0.9))},
    "all blocks": lambda span: {"stack": Interval(2, part(span))},
    "inside of a UNet": lambda span: {"deep": Interval(2, part(span))},
}
AUTOMATIC = "automatic"
# Which depth saves most, as measured (docs/feature-reuse.md); "automatic" tries them in this order.
SAVING = ("all blocks", "inside of a UNet", "half of the blocks", "all attention", "attention")


def feature_inputs() -> list[io.Input]:
    """The inputs that say which features are reused and where they are cached."""
    weight = "Parts of the network are taken from the cache; how they are carried forward."
    depth = "Which parts are reused. automatic = those that save most and that memory can hold."
    return [
        advanced(io.Combo.Input("feature_reuse", options=list(WEIGHTS), default="as preset", tooltip=weight)),
        advanced(io.Combo.Input("reuse_depth", options=[AUTOMATIC, *DEPTHS], default=AUTOMATIC, tooltip=depth)),
        *storage_inputs(),
    ]


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
    weight = choice(node, inputs, "feature_reuse", WEIGHTS)
    depth = choice(node, inputs, "reuse_depth", (AUTOMATIC, *DEPTHS))
    storage = storage_settings(node, inputs)
    if weight == "as preset":
        return preset and replace(preset, storage=storage)
    if weight == "off":
        return None
    depths = tuple((name, DEPTHS[name](span)) for name in SAVING) if depth == AUTOMATIC else ()
    intervals = DEPTHS[SAVING[-1] if depths else depth](span)
    return ReuseSettings(intervals, weight, 1.0 if weight == "ramp" else 0.5, storage, depths)


def storage_settings(node: Node, inputs: Inputs) -> StorageSettings:
    """StorageSettings of a node's inputs. Raises ValueError on wrong inputs, and for a GPU that is not there."""
    dtype = choice(node, inputs, "memory_dtype", DTYPES)
    device, count = choice(node, inputs, "memory_device", DEVICES), torch.cuda.device_count()
    if device == "second gpu" and count < 2:
        machine = f"this machine has {count} GPU(s)"
        raise wrong(node, f"memory_device is 'second gpu', but {machine}; choose 'same' or 'cpu'.")
    return StorageSettings(int(inputs["memory_gb"] * 1e9) or None, DEVICES[device], dtype)
