"""FasterCacheAutoFR: finds the policy for the user's own model and sampling."""

import math
from functools import partial
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..fastercache_core import messages
from ..fastercache_core.calibration import gradient, search
from ..fastercache_core.calibration.policy import Policy
from .drawing import GRID, Canvas
from .host.calibrate import CalibrationError, Sampling, Search, find_policy
from .host.found import keep
from .inputs import denoise_input, model_input, prompt_inputs, sampler_inputs
from .kinds import CachePolicy
from .policy import summary
from .schema import schema, wrong

METHODS: dict[str, Search] = {
    "exact search": search.find_points,
    "gradient": gradient.find_points,
    "minimax search": partial(search.find_points, objective="minimax"),
}
# In the order of Sampling.
SAMPLING = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
LINE, CHOSEN = "#5bc0de", "#d9534f"
WIDTH, HEIGHT, MARGIN = 720, 480, 70


class FasterCacheAutoFR(io.ComfyNode):
    """Samples a few pictures in full on your own model, finds which steps are needed least at every cost, and fits how
    to predict them. It takes the time of about two full samplings; the policy then serves every prompt and seed with
    these settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        budget = "Share of the network passes that may run; the policy is fitted to it."
        method = "How steps are chosen: least total error, FRDiff's gradient search, or least largest error."
        pictures = "Pictures to learn from, as one batch with different noise. More are safer; 1 for video."
        features = "Also test reused features, so that a search may choose them. About three more samplings."
        inputs = [
            model_input("The model with its LoRAs. FasterCache nodes on it are ignored here."),
            *prompt_inputs(),
            io.Latent.Input("latent_image", tooltip="The size that you sample at."),
            *sampler_inputs((4, 30, 1000), cfg=5.0),
            denoise_input(),
            io.Float.Input("budget", default=0.5, min=0.05, max=1.0, step=0.01, tooltip=budget),
            io.Combo.Input("method", options=list(METHODS), default="exact search", tooltip=method),
            io.Int.Input("pictures", default=4, min=1, max=64, tooltip=pictures),
            io.Boolean.Input("features", default=False, optional=True, tooltip=features),
        ]
        outputs = [
            CachePolicy.Output("policy", tooltip="For FasterCache FRDiff, or to save."),
            io.String.Output("report", tooltip="What was found: cost, error and what each step does."),
            io.Image.Output("curve", tooltip="Expected error at every cost."),
        ]
        return schema(cls, "FasterCacheAutoFR", "FasterCache Auto-FR", inputs, outputs)

    @classmethod
    def execute(cls, model: ModelPatcher, **inputs: Any) -> io.NodeOutput:
        method = inputs["method"]
        latent = comfy.utils.repeat_to_batch_size(inputs["latent_image"]["samples"], inputs["pictures"])
        sampling = Sampling(inputs["positive"], inputs["negative"], latent, *(inputs[name] for name in SAMPLING))
        try:
            policy = find_policy(model, sampling, inputs["budget"], METHODS[method], inputs.get("features", False))
        except CalibrationError as error:
            raise wrong(cls, f"{error}.") from error
        return io.NodeOutput(policy, f"{text(policy)}\n\n{messages.keeps_found(keep(policy))}", curve(policy))


def text(policy: Policy) -> str:
    """What was found, for a person: the chosen point, then the whole curve."""
    lines = [f"cost {point.cost:.2f}  error {point.error:8.3%}  {point.actions()}" for point in policy.points]
    return "\n".join([summary(policy), "", *lines])


def curve(policy: Policy) -> torch.Tensor:
    """Draw error over cost, the chosen point marked: IMAGE [1, height, width, 3] in 0..1."""
    canvas = Canvas(WIDTH, HEIGHT)
    shown = [(p.cost, math.log10(max(p.error, 1e-6))) for p in policy.points]
    low, high = math.floor(min(y for _, y in shown)), math.ceil(max(y for _, y in shown) + 1e-6)
    for cost in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, _ = _place(cost, low, low, high)
        canvas.draw.line((x, MARGIN / 2, x, HEIGHT - MARGIN), fill=GRID)
        canvas.text((x, HEIGHT - MARGIN + 8), f"{cost:.1f}", anchor="ma")
    for power in range(low, high + 1):
        x, y = _place(0.0, power, low, high)
        canvas.draw.line((x, y, WIDTH - MARGIN / 2, y), fill=GRID)
        canvas.text((x - 8, y), f"{10.0 ** (power + 2):g}%", anchor="rm")
    places = [_place(x, y, low, high) for x, y in shown]
    canvas.draw.line(places, fill=LINE, width=3)
    x, y = places[policy.chosen]
    canvas.draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=CHOSEN)
    canvas.text((MARGIN, 10), f"error of the latent over cost; chosen: {policy.cost:.2f}, {policy.error:.2%}")
    return canvas.image()


def _place(cost: float, power: float, low: int, high: int) -> tuple[float, float]:
    """Where a point is drawn. power: log10 of its error, from `low` to `high`."""
    up = (power - low) / (high - low)
    return MARGIN + cost * (WIDTH - 1.5 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 1.5 * MARGIN)
