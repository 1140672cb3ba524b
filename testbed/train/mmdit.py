"""Train the small SD3 MMDiT, a flow model of pictures."""

import math
from functools import partial

import data
import torch
from training import WIDTH, Recipe, flow_loss, main

DEPTH, CHANNELS, SIDE, SHIFT = 4, 16, 16, 3.0


def positions(side, width):
    """Sine and cosine position table [1,side*side,width]."""
    steps = torch.arange(side).float()[:, None] * math.pi / side
    waves = steps * torch.arange(1, width // 4 + 1) ** 0.5
    line = torch.cat([waves.sin(), waves.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).reshape(1, side * side, width)


def build():
    """A fresh model; every block starts as the identity and the output as zero."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    hidden = 64 * DEPTH
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": hidden}}
    model = OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=CHANNELS,
        depth=DEPTH,
        num_patches=(SIDE // 2) ** 2,
        pos_embed_max_size=SIDE // 2,
        qk_norm="rms",
        adm_in_channels=WIDTH,
        context_embedder_config=embedder,
        operations=torch.nn,
    )
    for name, weight in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):
            torch.nn.init.zeros_(weight)
        if name.endswith(("ln_q.weight", "ln_k.weight")):
            torch.nn.init.ones_(weight)
    table = positions(SIDE // 2, hidden)
    del model.pos_embed
    model.pos_embed = torch.nn.Parameter(table)
    return model


def velocity(model, x, sigma, context, pooled):
    """What the network gives for latents of flow time sigma."""
    return model(x, sigma * 1000, context=context, y=pooled)


def loss(model, codec, pictures, prompts, generator):
    """Squared error of the velocity."""
    return flow_loss(partial(velocity, model), codec, pictures, prompts, generator, SHIFT)


RECIPE = Recipe("emoji_mmdit", build, loss, data.batch)
if __name__ == "__main__":
    main(RECIPE)
