"""Nodes of the test bed: prompts, pictures and clips of the small emoji models."""

import comfy.latent_formats
from comfy_api.latest import ComfyExtension, io

from . import emoji_unet, photos_lumina
from .emoji import CODECS, MODELS, conditioning, load_codec

UNET = MODELS / "emoji_unet" / "emoji_unet.safetensors"
PHOTOS = MODELS / "photos_lumina" / "photos_lumina.safetensors"
STILL = [name for name in CODECS if name != "emoji_wan"]


def whose(names):
    """The input that says for which model the node works."""
    return io.Combo.Input("model", options=list(names), default="emoji_mmdit", optional=True)


def scale_input():
    """The input that enlarges pictures."""
    return io.Int.Input("scale", default=1, min=1, max=16)


def to_images(pictures, scale):
    """Pictures [B,3,H,W] as the host's IMAGE [B,H*scale,W*scale,3]."""
    return pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1)


class OwnLoader(io.ComfyNode):
    """Loads one model that is too small for the host's own loader."""

    title, description, module, weights = "", "", emoji_unet, UNET

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=cls.title.replace(" ", ""),
            display_name=cls.title,
            category="testbed",
            description=cls.description,
            inputs=[],
            outputs=[io.Model.Output("model")],
        )

    @classmethod
    def execute(cls):
        return io.NodeOutput(cls.module.load(cls.weights))


class EmojiUNetLoader(OwnLoader):
    """Loads the emoji UNet."""

    title = "Emoji UNet Loader"
    description = "Loads the emoji UNet, a small model of the SD 1.x style that predicts noise."


class PhotosLoader(OwnLoader):
    """Loads the photograph model."""

    title, module, weights = "Photos Loader", photos_lumina, PHOTOS
    description = "Loads the photograph model, a small Lumina 2 for pictures of 128x128."


class EmojiPrompt(io.ComfyNode):
    """Turns lines of words into the conditioning of an emoji model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EmojiPrompt",
            display_name="Emoji Prompt",
            category="testbed",
            description='One prompt per line, such as "red apple on blue and pink"; for emoji_wan with a motion: '
            '"red apple moving left on blue"; for photos_lumina "cat upper left near". Empty text is the null prompt.',
            inputs=[io.String.Input("prompts", multiline=True, default="red apple on blue"), whose(CODECS)],
            outputs=[io.Conditioning.Output("conditioning")],
        )

    @classmethod
    def execute(cls, prompts, model="emoji_mmdit"):
        lines = [line for line in prompts.splitlines() if line.strip()] or [""]
        return io.NodeOutput(conditioning(model, lines))


class EmojiDecode(io.ComfyNode):
    """Turns latents of an emoji model into pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EmojiDecode",
            display_name="Emoji Decode",
            category="testbed",
            description="Decodes emoji latents, and enlarges the pixels by a whole number.",
            inputs=[io.Latent.Input("samples"), scale_input(), whose(STILL)],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, samples, scale, model="emoji_mmdit"):
        latents = comfy.latent_formats.SD3().process_in(samples["samples"].float().cpu())
        return io.NodeOutput(to_images(load_codec(model).decode(latents), scale))


class EmojiVideoDecode(io.ComfyNode):
    """Turns latents of the emoji clip model into frames."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EmojiVideoDecode",
            display_name="Emoji Video Decode",
            category="testbed",
            description="Decodes emoji clips to frames, all frames of the first clip first.",
            inputs=[io.Latent.Input("samples"), scale_input()],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, samples, scale):
        latents = comfy.latent_formats.Wan22().process_in(samples["samples"].float().cpu())
        return io.NodeOutput(to_images(load_codec("emoji_wan").decode(latents).flatten(0, 1), scale))


class TestbedExtension(ComfyExtension):
    """Hands the nodes to ComfyUI."""

    async def get_node_list(self):
        return [EmojiUNetLoader, PhotosLoader, EmojiPrompt, EmojiDecode, EmojiVideoDecode]


async def comfy_entrypoint():
    """What ComfyUI calls when it loads the package."""
    return TestbedExtension()
