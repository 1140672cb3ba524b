"""Full sampling of a test bed's model inside this process, with every evaluation kept."""
import sys
from dataclasses import dataclass

import torch
from testbed.beds import BEDS
from testbed.server import comfyui_path


@dataclass
class Recording:
    """One full run: sigmas [evaluations + 1]; cond, difference (uncond - cond, both in the network's
    output space) [evaluations, batch, channels, (frames,) height, width]; latent [batch, ...], the
    result, as the network sees it."""
    sigmas: list
    cond: torch.Tensor
    difference: torch.Tensor
    latent: torch.Tensor

    @property
    def uncond(self):
        """The unconditional output, shaped as cond."""
        return self.cond + self.difference


def load_model(bed="mmdit"):
    """The model of a bed, a name in BEDS, as the host loads it, on the CPU."""
    sys.path.insert(0, str(comfyui_path()))
    import comfy.cli_args
    comfy.cli_args.args.cpu = True
    return BEDS[bed].load()


def record(model, prompts, steps, cfg, seed, bed="mmdit"):
    """Sample `prompts` in full with Euler and the bed's scheduler: a Recording."""
    import comfy.sample
    model, bed, seen = model.clone(), BEDS[bed], []

    def keep(args):
        cond, uncond = (network_output(model, args["sigma"], args["input"], args[f"{branch}_denoised"])
                        for branch in ("cond", "uncond"))
        seen.append((float(args["sigma"][0]), cond, uncond - cond, args["denoised"]))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(keep)
    latent = bed.empty(len(prompts))
    noise = comfy.sample.prepare_noise(latent, seed)
    comfy.sample.sample(model, noise, steps, cfg, "euler", bed.scheduler, bed.conditioning(prompts),
                        bed.conditioning([""]), latent, disable_pbar=True, seed=seed)
    sigmas, cond, difference, denoised = zip(*seen)
    return Recording([*sigmas, 0.0], torch.stack(cond), torch.stack(difference), denoised[-1])


def network_output(model, sigma, x, denoised):
    """What the network gave, [batch, ...], where the host's guidance sees `denoised` of the latent x.

    Denoised is skip(x) + scale * output for every prediction type: both parts are asked of the host.
    """
    to_denoised, zero = model.get_model_object("model_sampling").calculate_denoised, torch.zeros_like(x)
    return (denoised - to_denoised(sigma, zero, x)) / to_denoised(sigma, torch.ones_like(x), zero)


def conditioning(prompts, bed="mmdit"):
    """The host's conditioning of the prompts."""
    return BEDS[bed].conditioning(prompts)
