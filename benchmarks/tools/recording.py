"""Full sampling of the test bed's model inside this process, with every evaluation kept."""
import sys
from dataclasses import dataclass

import torch
from benchmarks.tools.sampling import MODEL_FILE
from testbed.server import MODELS, comfyui_path


@dataclass
class Recording:
    """One full run: sigmas [evaluations + 1]; cond, difference (uncond - cond, both in the network's
    output space) [evaluations, batch, channels, height, width]; latent [batch, ...], the result,
    as the network sees it."""
    sigmas: list
    cond: torch.Tensor
    difference: torch.Tensor
    latent: torch.Tensor

    @property
    def uncond(self):
        """The unconditional output, shaped as cond."""
        return self.cond + self.difference


def load_model():
    """The test bed's model as the host loads it, on the CPU."""
    sys.path.insert(0, str(comfyui_path()))
    import comfy.cli_args
    comfy.cli_args.args.cpu = True
    import comfy.sd
    return comfy.sd.load_diffusion_model(str(MODELS / MODEL_FILE))


def record(model, prompts, steps, cfg, seed):
    """Sample `prompts` in full with Euler and the `simple` scheduler: a Recording."""
    import comfy.sample
    model, seen = model.clone(), []

    def keep(args):
        sigma = args["sigma"].view(-1, 1, 1, 1)  # a flow model: denoised = x - sigma * output
        output = (args["input"] - args["cond_denoised"]) / sigma
        difference = (args["cond_denoised"] - args["uncond_denoised"]) / sigma
        seen.append((float(sigma[0]), output, difference, args["denoised"]))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(keep)
    latent = torch.zeros(len(prompts), 16, 16, 16)
    noise = comfy.sample.prepare_noise(latent, seed)
    comfy.sample.sample(model, noise, steps, cfg, "euler", "simple", conditioning(prompts), conditioning([""]),
                        latent, disable_pbar=True, seed=seed)
    sigmas, cond, difference, denoised = zip(*seen)
    return Recording([*sigmas, 0.0], torch.stack(cond), torch.stack(difference), denoised[-1])


def conditioning(prompts):
    """The host's conditioning of the prompts."""
    from testbed.nodes.emoji import Codec  # its package needs the host
    codec = Codec.load(MODELS / "emoji_text.safetensors")
    context, pooled = codec.embed(codec.tokens(prompts))
    return [[context, {"pooled_output": pooled}]]
