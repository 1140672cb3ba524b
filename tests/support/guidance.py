"""CFG-Cache on tiny models: settings, and what people put on conditionings."""

from typing import Any

import comfy.cldm.cldm
import comfy.context_windows
import comfy.controlnet
import comfy.hooks
import torch
from fastercache_pack.fastercache_core.clock import Interval, Window
from fastercache_pack.fastercache_core.controllers.interval import IntervalSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.fastercache_core.signal import DifferenceSettings, OutputSettings
from torch import Tensor

from nodes import ControlNetApplyAdvanced
from support import tiny
from support.tiny import CPU, SPECS, conditioning

STEPS = 16
Conditioning = list[Any]


def cfg_cache(
    every: int = 2, window: Window = Window(), forecast: str = "fitted", weights: str = "none", tolerance: Any = None
) -> CacheSettings:
    """Uncond estimated between every `every`-th evaluation and the next; tolerance None: whatever its error."""
    controller = IntervalSettings(estimate=Interval(every, window), tolerance=tolerance)
    return CacheSettings("CFG-Cache", controller, DifferenceSettings(forecast, weights))


def with_steps(every: int = 2, window: Window = Window(), forecast: str = "fitted") -> CacheSettings:
    """As `cfg_cache`, and whole evaluations predicted where the sampler allows it."""
    interval = Interval(every, window)
    return CacheSettings(
        "steps", IntervalSettings(interval, interval), DifferenceSettings(forecast), OutputSettings(forecast)
    )


NEVER = cfg_cache(window=Window(1.0, 1.0))
EVERY_SECOND = cfg_cache()


def sample(model: Any, family: str = "sd15", batch: int = 1, **options: Any) -> Tensor:
    """STEPS steps on a latent of 8 x 8, to be quick."""
    latent = torch.zeros(batch, SPECS[family]["lat"][0], 8, 8)
    return tiny.sample(model, family, STEPS, **{"latent": latent, **options})


def prompt(seed: int) -> Conditioning:
    """A prompt for sd15."""
    return conditioning("sd15", seed)


def area(cond: Conditioning, x: int, y: int) -> Conditioning:
    """The conditioning limited to an 8 x 8 corner of the latent."""
    return [[tensor, {**fields, "area": (8, 8, y, x), "strength": 1.0}] for tensor, fields in cond]


def windowed(model: Any, schedule: str = "standard_static") -> Any:
    """A clone of `model` that samples a video in context windows of three frames each."""
    model = model.clone()
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule(schedule),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=3,
        context_overlap=1,
        context_stride=1,
        closed_loop=False,
        dim=2,
    )
    return model


def control_net(seed: int = 5) -> comfy.controlnet.ControlNet:
    """A tiny ControlNet of the host for the sd15 spec, with random weights."""
    config = {k: v for k, v in SPECS["sd15"]["cfg"].items() if k != "out_channels"}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, num_heads=8)
    tiny.random_weights(network, seed)
    return comfy.controlnet.ControlNet(network.eval(), load_device=CPU)


class Controlled:
    """Conditionings under one ControlNet, as the host's node makes them, and the rows that it sees."""

    def __init__(self, start: float = 0.0, end: float = 1.0, only_positive: bool = False) -> None:
        self.net, self.rows = control_net(), []
        picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6))
        positive, negative = ControlNetApplyAdvanced().apply_controlnet(
            prompt(1), prompt(2), self.net, picture, 0.3, start, end
        )
        self.options = dict(positive=positive, negative=prompt(2) if only_positive else negative)
        self.net.control_model.register_forward_pre_hook(
            lambda _, args, kwargs: self.rows.append(kwargs["x"].shape[0]), with_kwargs=True
        )

    def sample(self, model: Any) -> tuple[Tensor, int]:
        """(picture, rows that the ControlNet saw)."""
        self.rows.clear()
        return sample(model, "sd15", **self.options), sum(self.rows)


def lora(model: Any, size: float = 0.3) -> dict[str, Tensor]:
    """A LoRA of rank 2 on every linear layer of a tiny model, in the host's own format."""
    g, weights = torch.Generator().manual_seed(11), {}
    for name, tensor in sorted(model.model.diffusion_model.state_dict().items()):
        if tensor.ndim == 2:
            key = "diffusion_model." + name.removesuffix(".weight")
            weights[key + ".lora_up.weight"] = torch.randn(tensor.shape[0], 2, generator=g) * size
            weights[key + ".lora_down.weight"] = torch.randn(2, tensor.shape[1], generator=g) / tensor.shape[1] ** 0.5
    return weights


def hooked(model: Any, cond: Conditioning, keyframes: Any = ()) -> Conditioning:
    """The conditioning with a LoRA of its own; keyframes: (strength, start_percent, guarantee_steps)."""
    hooks = comfy.hooks.create_hook_lora(lora(model), 1.0, 1.0)
    group = comfy.hooks.HookKeyframeGroup()
    for keyframe in keyframes:
        group.add(comfy.hooks.HookKeyframe(*keyframe))
    hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(cond, hooks)
