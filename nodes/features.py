"""What nodes have in common that reuse features: which, how they are carried forward, and where they are kept."""
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..fastercache_core.clock import Window
from ..fastercache_core.reuse import REUSE_WEIGHTS, ReuseSettings
from ..fastercache_core.schedule import Interval
from ..fastercache_core.storage import DTYPES, StorageSettings
from .schema import advanced, choice

FORECASTS = ("as preset", "off", *REUSE_WEIGHTS)
DEVICES = {"same": None, "cpu": "cpu", "second gpu": "cuda:1"}


def middle(span, start, end):
    """The part of a window between two fractions of it."""
    length = span.end - span.start
    return Window(span.start + start * length, span.start + end * length)


# Name of a depth -> {kind of site: Interval}, inside a window. None reaches its end: the last steps of flow models
# are so large that one evaluation with features from the cache costs more there than all others together.
DEPTHS = {
    "attention": lambda span: dict.fromkeys(("self", "temporal"), Interval(2, middle(span, 0.0, 0.9))),
    "all attention": lambda span: dict.fromkeys(("self", "temporal", "cross"), Interval(2, middle(span, 0.0, 0.9))),
    # PAB (arXiv 2408.12588): the middle 70% of sampling, the less often the less a kind of attention changes there.
    "pyramid attention": lambda span: {kind: Interval(every, middle(span, 0.15, 0.85))
                                       for kind, every in (("self", 2), ("temporal", 4), ("cross", 6))},
    "half of the blocks": lambda span: {"rear": Interval(2, middle(span, 0.0, 0.5)),
                                        "front": Interval(2, middle(span, 0.5, 0.9))},
    "all blocks": lambda span: {"stack": Interval(2, middle(span, 0.0, 0.9))},
    "inside of a UNet": lambda span: {"deep": Interval(2, middle(span, 0.0, 0.9))},
}
AUTOMATIC = "automatic"
# Which depth saves most, as measured (docs/feature-reuse.md); "automatic" tries them in this order.
SAVING = ("all blocks", "inside of a UNet", "half of the blocks", "all attention", "attention")


def feature_inputs():
    """The inputs that say which features are reused and where they are kept."""
    return [
        advanced(io.Combo.Input("feature_reuse", options=list(FORECASTS), default="as preset",
                                tooltip="Parts of the network from the cache: with none at every second step, with "
                                        "exact-looking, balanced and fast with samplers that let no step be "
                                        "skipped (those that add noise, for example), as far as the picture "
                                        "stays as close as wanted. as preset = only "
                                        "with paper, measured = continued as they were seen to move, spaced = "
                                        "by their last change, as far as the noise level goes, constant = by "
                                        "half of it, linear = with the paper's growing weight, hold = as they "
                                        "were.")),
        advanced(io.Combo.Input("reuse_depth", options=[AUTOMATIC, *DEPTHS], default=AUTOMATIC,
                                tooltip="Which parts. automatic = those that save most of what the model has and "
                                        "memory holds; attention = self-attention (FasterCache); all attention = "
                                        "cross-attention too; pyramid attention = PAB: the prompt's at every sixth "
                                        "step only, which costs closeness; half of the blocks = Delta-DiT; all "
                                        "blocks = all but the first; inside of a UNet = DeepCache. A model that "
                                        "lacks the parts gets the nearest ones, and the report says so.")),
        *storage_inputs(),
    ]


def storage_inputs():
    """The inputs that say where features are kept."""
    return [
        advanced(io.Float.Input("memory_gb", default=0.0, min=0.0, max=512.0, step=0.1, round=0.001,
                                tooltip="Most memory that cached features may take. 0 = up to half of what ComfyUI "
                                        "reports free when sampling starts.")),
        advanced(io.Combo.Input("memory_device", options=list(DEVICES), default="same",
                                tooltip="Where cached features are kept: beside the model, in main memory (slower, "
                                        "saves VRAM), or on a second GPU.")),
        advanced(io.Combo.Input("memory_dtype", options=list(DTYPES), default="native",
                                tooltip="How cached features are kept: native = as they are, fp16 = half size of "
                                        "fp32, fp8 = smaller still: 8 bits a number, but the newest of several "
                                        "values in 16.")),
    ]


def feature_settings(node, preset, span, feature_reuse, reuse_depth, **storage):
    """ReuseSettings of the inputs, None for off. Raises ValueError on what is not allowed.

    preset: the ReuseSettings of the preset, or None.
    """
    choice(node, "feature_reuse", feature_reuse, FORECASTS)
    choice(node, "reuse_depth", reuse_depth, (AUTOMATIC, *DEPTHS))
    kept = storage_settings(node, **storage)
    if feature_reuse == "as preset":
        return preset and replace(preset, storage=kept)
    if feature_reuse == "off":
        return None
    depths = tuple((name, DEPTHS[name](span)) for name in SAVING) if reuse_depth == AUTOMATIC else ()
    intervals = DEPTHS[SAVING[-1] if depths else reuse_depth](span)
    return ReuseSettings(intervals, feature_reuse, 1.0 if feature_reuse == "linear" else 0.5, kept, depths)


def storage_settings(node, memory_gb, memory_device, memory_dtype):
    """StorageSettings of the inputs. Raises ValueError on what is not allowed."""
    choice(node, "memory_dtype", memory_dtype, DTYPES)
    return StorageSettings(int(memory_gb * 1e9) or None, device(node, memory_device), memory_dtype)


def device(node, name):
    """The device of a choice. Raises ValueError naming `node` when this machine lacks it."""
    found = DEVICES[choice(node, "memory_device", name, DEVICES)]
    if name == "second gpu" and torch.cuda.device_count() < 2:
        raise ValueError(f"{node}: memory_device is 'second gpu', but this machine has "
                         f"{torch.cuda.device_count()} GPU(s); choose 'same' or 'cpu'.")
    return found
