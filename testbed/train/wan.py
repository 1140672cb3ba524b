"""Train the small Wan model, a flow model of clips."""

from functools import partial

import data
import torch
from training import Recipe, emoji, flow_loss, main

DIM, HEADS, FFN, LAYERS, CHANNELS, SHIFT = 256, 2, 1024, 6, 48, 8.0


def build():
    """A fresh model; every block starts as the identity and the output as zero."""
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        dim=DIM,
        num_heads=HEADS,
        ffn_dim=FFN,
        num_layers=LAYERS,
        in_dim=CHANNELS,
        out_dim=CHANNELS,
        text_dim=emoji.WIDE,
        operations=torch.nn,
    )
    for name, weight in model.named_parameters():
        if "time_projection" in name or "head.head" in name or "modulation" in name or "cross_attn.o" in name:
            torch.nn.init.zeros_(weight)
    torch.nn.init.zeros_(model.text_embedding[0].weight[:, 128:])  # only zeros come there
    return model


def velocity(model, x, sigma, context, pooled):
    """What the network gives for latents of flow time sigma."""
    return model(x, sigma * 1000, context=context)


def loss(model, codec, clips, prompts, generator):
    """Squared error of the velocity."""
    return flow_loss(partial(velocity, model), codec, clips, prompts, generator, SHIFT)


WORDS = tuple(word for motion in data.MOTIONS for word in motion.split())
RECIPE = Recipe("emoji_wan", build, loss, data.clips, partial(data.vocabulary, more=WORDS), emoji.ClipCodec, CHANNELS)
if __name__ == "__main__":
    main(RECIPE)
