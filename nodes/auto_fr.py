"""FasterCacheAutoFR: finds the policy for the user's own model and sampling."""
import math
from functools import partial

import comfy.samplers
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont

from ..fastercache_core import autofr, calibration
from .host.calibrate import CalibrationError, Sampling, find_policy
from .policy import CachePolicy, summary
from .schema import choice, name_of, schema

METHODS = {"exact search": calibration.find_points, "gradient": autofr.find_points,
           "minimax search": partial(calibration.find_points, objective="minimax")}
INK, PAPER, GRID, LINE, CHOSEN = "#222222", "#ffffff", "#dddddd", "#5bc0de", "#d9534f"
WIDTH, HEIGHT, MARGIN = 720, 480, 70


class FasterCacheAutoFR(io.ComfyNode):
    """Samples a few pictures in full and finds which steps need not be computed."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCacheAutoFR",
            display_name="FasterCache Auto-FR",
            description="Samples a few pictures in full on your own model, finds which steps are needed least at "
                        "every cost, and fits how to foresee them. It takes the time of about two full samplings; "
                        "the policy then serves every prompt and seed with these settings.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its LoRAs. A cache node on it is left out here."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt you use."),
                io.Latent.Input("latent_image", tooltip="The size you sample at."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Seed of the noise."),
                io.Int.Input("steps", default=30, min=4, max=1000, tooltip="The steps you use."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="The guidance scale you use."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS,
                               tooltip="The sampler you use. With euler and ddim whole steps can be left out, "
                                       "with others the negative pass only."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS,
                               tooltip="How the noise levels are spaced."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="1.0 = from pure noise."),
                io.Float.Input("budget", default=0.5, min=0.05, max=1.0, step=0.01,
                               tooltip="Part of the network passes that may be run. The policy fits its forecasts "
                                       "to this cost and also knows what to do at any other."),
                io.Combo.Input("method", options=list(METHODS), default="exact search",
                               tooltip="exact search = the least error in sum for every cost, by dynamic "
                                       "programming; gradient = FRDiff's Auto-FR, gates trained by gradient descent; "
                                       "minimax search = as exact search, but the largest error between two computed "
                                       "steps is made least, then the second largest, and so on."),
                io.Int.Input("pictures", default=4, min=1, max=64,
                             tooltip="Pictures to learn from, sampled as one batch with different noise. "
                                     "More are safer; 1 for video."),
                io.Boolean.Input("features", default=False, optional=True,
                                 tooltip="Also try reused features (FRDiff), so that a search may choose them. "
                                         "Costs about as much as three more samplings."),
            ],
            outputs=[CachePolicy.Output("policy", tooltip="For FasterCache FRDiff, or to save."),
                     io.String.Output("report", tooltip="What was found: cost, error and what each step does."),
                     io.Image.Output("curve", tooltip="Foreseen error at every cost.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise,
                budget, method, pictures, features=False):
        search = METHODS[choice(name_of(cls), "method", method, METHODS)]
        latent = comfy.utils.repeat_to_batch_size(latent_image["samples"], pictures)
        sampling = Sampling(positive, negative, latent, seed, steps, cfg, sampler_name, scheduler, denoise)
        try:
            policy = find_policy(model, sampling, budget, search, features and method != "gradient")
        except CalibrationError as error:
            raise ValueError(f"{name_of(cls)}: {error}.") from error
        return io.NodeOutput(policy, text(policy), curve(policy))


def text(policy):
    """What was found, for a person: the chosen point, then the whole curve."""
    lines = [f"cost {point.cost:.2f}  error {point.error:8.3%}  {point.actions()}" for point in policy.points]
    return "\n".join([summary(policy), "", *lines])


def curve(policy):
    """Draw error over cost, the chosen point marked: IMAGE [1, height, width, 3] in 0..1."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    shown = [(p.cost, math.log10(max(p.error, 1e-6))) for p in policy.points]
    low, high = math.floor(min(y for _, y in shown)), math.ceil(max(y for _, y in shown) + 1e-6)
    for tenth in range(0, 11, 2):
        x, _ = _place(tenth / 10, low, low, high)
        draw.line((x, MARGIN / 2, x, HEIGHT - MARGIN), fill=GRID)
        draw.text((x, HEIGHT - MARGIN + 8), f"{tenth / 10:.1f}", fill=INK, font=font, anchor="ma")
    for power in range(low, high + 1):
        x, y = _place(0.0, power, low, high)
        draw.line((x, y, WIDTH - MARGIN / 2, y), fill=GRID)
        draw.text((x - 8, y), f"{10.0 ** (power + 2):g}%", fill=INK, font=font, anchor="rm")
    places = [_place(x, y, low, high) for x, y in shown]
    draw.line(places, fill=LINE, width=3)
    x, y = places[policy.chosen]
    draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=CHOSEN)
    draw.text((MARGIN, 10), f"error of the latent over cost; chosen: {policy.cost:.2f}, {policy.error:.2%}",
              fill=INK, font=font)
    return torch.from_numpy(np.array(canvas, dtype=np.float32) / 255)[None]


def _place(cost, power, low, high):
    """Where a point is drawn. power: log10 of its error, from `low` to `high`."""
    return (MARGIN + cost * (WIDTH - 1.5 * MARGIN),
            HEIGHT - MARGIN - (power - low) / (high - low) * (HEIGHT - 1.5 * MARGIN))
