"""Full sampling of a test bed's model inside this process, with every evaluation recorded."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.beds import BEDS
from testbed.server import comfyui_path


@dataclass
class Recording:
    """One full run.

    sigmas: [evaluations + 1]; cond, difference (uncond - cond, both in the network's output space): [evaluations,
    batch, channels, (frames,) height, width]; latent: the result, [batch, ...], as the network sees it.
    """

    sigmas: list[float]
    cond: Tensor
    difference: Tensor
    latent: Tensor

    @property
    def uncond(self) -> Tensor:
        """The unconditional output, shaped as cond."""
        return self.cond + self.difference


def load_model(bed: str = "mmdit") -> Any:
    """The model (ModelPatcher) of a bed, a name in BEDS, as the host loads it, on the CPU."""
    sys.path.insert(0, str(comfyui_path()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    return BEDS[bed].load()


def record(model: Any, prompts: Sequence[str], steps: int, cfg: float, seed: int, bed: str = "mmdit") -> Recording:
    """Sample `prompts` in full with Euler and the bed's scheduler."""
    import comfy.sample

    model, chosen = model.clone(), BEDS[bed]
    evaluations: list[tuple[float, Tensor, Tensor, Tensor]] = []

    def add(args: dict[str, Any]) -> Tensor:
        cond, uncond = (
            network_output(model, args["sigma"], args["input"], args[f"{branch}_denoised"])
            for branch in ("cond", "uncond")
        )
        evaluations.append((float(args["sigma"][0]), cond, uncond - cond, args["denoised"]))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(add)
    latent = chosen.empty(len(prompts))
    noise = comfy.sample.prepare_noise(latent, seed)
    inputs = steps, cfg, "euler", chosen.scheduler, chosen.conditioning(prompts), chosen.conditioning([""]), latent
    comfy.sample.sample(model, noise, *inputs, disable_pbar=True, seed=seed)
    sigmas, cond, difference, denoised = zip(*evaluations)
    return Recording([*sigmas, 0.0], torch.stack(cond), torch.stack(difference), denoised[-1])


def network_output(model: Any, sigma: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
    """What the network gave, [batch, ...], where the host's guidance sees `denoised` of the latent x.

    Denoised is skip(x) + scale * output for every prediction type: both parts are asked of the host.
    """
    to_denoised, zero = model.get_model_object("model_sampling").calculate_denoised, torch.zeros_like(x)
    return (denoised - to_denoised(sigma, zero, x)) / to_denoised(sigma, torch.ones_like(x), zero)
