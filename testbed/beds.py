"""The beds: each trained model with all that a graph or a script has to know about it, as data.

bed = BEDS["unet"]; steps, cfg = bed.steps, bed.cfg       # what the model is meant for
bed.graph(prompts), bed.decoder(["sample", 0])            # nodes of an API-format graph, for a Host
model = bed.load()                                        # in this process, with the host imported
bed.conditioning(prompts), bed.empty(8), bed.decode(model, samples)
"""

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
MODELS = FOLDER / "models"


def node(kind, **inputs):
    """One node of an API-format graph."""
    return {"class_type": kind, "inputs": inputs}


@dataclass(frozen=True)
class Bed:
    """One model. Nodes are (node id, inputs without links)."""

    model: str  # its folder in testbed/models, and the name of its weights there
    loader: tuple  # node that loads it
    empty_node: tuple  # node of an empty latent, without its batch_size
    decode_node: tuple  # node from latents to pictures
    latent: tuple  # shape of one latent, [channels, (frames,) height, width]
    scheduler: str  # the host's usual one for this kind of model
    frames: int = 1  # pictures that one latent decodes to; more than one: clips
    steps: int = 30  # that the model is meant for, as is cfg
    cfg: float = 4.5
    codec: str = ""  # the model whose prompts and pictures it shares; none: its own
    base: str = ""  # the model that it is a LoRA for; none: it is a whole model
    teacher: str = ""  # the bed that it should draw like
    subjects: str = "emoji"

    @property
    def file(self):
        """What was trained: the network's weights, or the LoRA."""
        return MODELS / self.model / f"{self.model}.safetensors"

    @property
    def weights(self):
        """The network's weights, without a LoRA."""
        return MODELS / self.base / f"{self.base}.safetensors" if self.base else self.file

    def prompts(self, part):
        """The prompts of a part of prompts.json, "tuning" or "report"; clips get a motion each, in turn."""
        known = json.loads((FOLDER / "prompts.json").read_text())
        if self.subjects != "emoji":
            return known[self.subjects][part]
        if self.frames == 1:
            return known[part]
        motions = known["motions"]
        return [prompt.replace(" on ", f" {motions[i % len(motions)]} on ") for i, prompt in enumerate(known[part])]

    def graph(self, prompts):
        """Nodes "load", "positive", "negative" and "empty" for a batch of prompts."""
        codec = self.codec or self.model
        return self.loaders() | {
            "positive": node("EmojiPrompt", prompts="\n".join(prompts), model=codec),
            "negative": node("EmojiPrompt", prompts="", model=codec),
            "empty": node(self.empty_node[0], **self.empty_node[1], batch_size=len(prompts)),
        }

    def loaders(self):
        """Node "load", which gives the model, and "base" before it where that is a LoRA."""
        loader = node(self.loader[0], **self.loader[1])
        if not self.base:
            return {"load": loader}
        lora = node("LoraLoaderModelOnly", model=["base", 0], lora_name=self.file.name, strength_model=1.0)
        return {"base": loader, "load": lora}

    def decoder(self, samples):
        """The node that decodes what the link `samples` brings to IMAGE [batch * frames, height, width, 3]."""
        return node(self.decode_node[0], **self.decode_node[1], samples=samples)

    def load(self):
        """The model as the host loads it (ModelPatcher); the host must be importable."""
        if self.loader[0] in DIRECT:
            return importlib.import_module(f"testbed.nodes.{DIRECT[self.loader[0]]}").load(self.weights)
        import comfy.sd
        import comfy.utils

        model = comfy.sd.load_diffusion_model(str(self.weights))
        if not self.base:
            return model
        model.model.requires_grad_(False)  # the host rounds a LoRA into 8-bit weights in place
        return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(self.file)), 1.0, 0.0)[0]

    def conditioning(self, prompts):
        """The host's conditioning of the prompts, one row a prompt."""
        from testbed.nodes.emoji import conditioning  # its package needs the host

        return conditioning(self.codec or self.model, prompts)

    def empty(self, count):
        """Empty latents [count, *latent]."""
        return torch.zeros(count, *self.latent)

    def decode(self, model, samples):
        """Pictures [batch, 3, side, side], or clips [batch, frames, 3, side, side], in 0..1 of sampled latents."""
        from testbed.nodes.emoji import load_codec  # its package needs the host

        return load_codec(self.codec or self.model).decode(model.get_model_object("latent_format").process_in(samples))


def unet_loader(name):
    """The host's own loader for a model that it recognises."""
    return "UNETLoader", {"unet_name": f"{name}.safetensors", "weight_dtype": "default"}


DIRECT = {"EmojiUNetLoader": "emoji_unet", "PhotosLoader": "photos_lumina"}  # a loader node of ours -> its module
STILL = ("EmptySD3LatentImage", {"width": 128, "height": 128})
CLIP = ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 13})
BEDS = {
    "mmdit": Bed(
        "emoji_mmdit", unet_loader("emoji_mmdit"), STILL, ("EmojiDecode", {"scale": 1}), (16, 16, 16), "simple"
    ),
    "unet": Bed(
        "emoji_unet",
        ("EmojiUNetLoader", {}),
        STILL,
        ("EmojiDecode", {"scale": 1, "model": "emoji_unet"}),
        (16, 16, 16),
        "normal",
    ),
    "wan": Bed(
        "emoji_wan",
        unet_loader("emoji_wan"),
        CLIP,
        ("EmojiVideoDecode", {"scale": 1}),
        (48, 4, 8, 8),
        "simple",
        frames=13,
    ),
}


def distilled(teacher, model, steps, base=""):
    """A bed made of another one: what loads it, beside a LoRA for `base`, is named after its weights."""
    of = BEDS[teacher]
    loader = unet_loader(base or model)
    return replace(of, model=model, loader=loader, codec=of.model, base=base, teacher=teacher, steps=steps, cfg=1.0)


BEDS |= {
    "mmdit_turbo8": distilled("mmdit", "emoji_mmdit_turbo8", 8),
    "photos": Bed(
        "photos_lumina",
        ("PhotosLoader", {}),
        ("EmptySD3LatentImage", {"width": 256, "height": 256}),
        ("EmojiDecode", {"scale": 1, "model": "photos_lumina"}),
        (16, 32, 32),
        "simple",
        subjects="photos",
    ),
    "wan_guided": distilled("wan", "emoji_wan_guided", 20, "emoji_wan"),
    "mmdit_turbo4": distilled("mmdit", "emoji_mmdit_turbo4", 4, "emoji_mmdit_turbo8"),
}
