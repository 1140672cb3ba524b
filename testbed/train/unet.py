"""Train the small UNet of the SD 1.x style, which predicts the noise of pictures."""

import data
import torch
from training import Recipe, main

ZEROED = ("out_layers.3", "proj_out")  # last layers of ResBlocks and transformers
LARGEST_WEIGHT = 20.0


def copy_input(model):
    """Make the network give its input, of unit variance: at large sigmas nearly all of it is the noise asked for.

    Input channel c goes as x and -x through channels 2c and 2c + 1, over the longest skip and the last
    normalisation (groups of two), and comes back as silu(x) - silu(-x) = x.
    """
    enter, leave = model.input_blocks[0][0], model.out[2]
    across = model.output_blocks[-1][0].skip_connection
    count, offset = 2 * enter.in_channels, across.in_channels - enter.out_channels
    for weight, bias in (
        (enter.weight[:count], enter.bias[:count]),
        (leave.weight, leave.bias),
        (across.weight[:count], across.bias[:count]),
    ):
        torch.nn.init.zeros_(weight)
        torch.nn.init.zeros_(bias)
    for i in range(count):
        sign = 1.0 - 2.0 * (i % 2)
        enter.weight[i, i // 2, 1, 1] = sign
        across.weight[i, offset + i, 0, 0] = 1.0
        leave.weight[i // 2, i, 1, 1] = sign


def build():
    """A fresh model; every block starts as the identity and the network as well."""
    import emoji_unet  # needs the host

    model = emoji_unet.network(torch.float32)
    for name, module in model.named_modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)  # the host's own layers leave this to the weights file
        if name.endswith(ZEROED):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    with torch.no_grad():
        copy_input(model)
    return model


def loss(model, codec, pictures, prompts, generator):
    """Squared error of the noise, at the host's own sigmas, weighted as if it were the velocity's.

    That weight is 1 + sigma^2: the plain error asks little of the first steps, which decide what is drawn.
    """
    import emoji_unet  # needs the host

    x0, sigmas = codec.encode(pictures), emoji_unet.model_sampling().sigmas
    step = torch.randint(len(sigmas), (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigmas[step].view(-1, 1, 1, 1)
    context, _ = codec.embed(codec.tokens(prompts))
    with torch.autocast("cpu", torch.bfloat16):
        found = model((x0 + s * noise) / (s**2 + 1) ** 0.5, step.float(), context=context)
    weight = (1 + s**2).clamp_max(LARGEST_WEIGHT)
    return (weight * (found.float() - noise).square()).mean() / weight.mean()


RECIPE = Recipe("emoji_unet", build, loss, data.batch)
if __name__ == "__main__":
    main(RECIPE)
