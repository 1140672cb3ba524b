"""Nodes of the test bed: prompts and pictures of the small emoji models."""
from pathlib import Path

import comfy.latent_formats
from comfy_api.latest import ComfyExtension, io

from .emoji import Codec

TEXT = Path(__file__).resolve().parent.parent / "models" / "emoji_mmdit" / "emoji_text.safetensors"


class EmojiPrompt(io.ComfyNode):
    """Turns lines of words into the conditioning of the emoji model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EmojiPrompt",
            display_name="Emoji Prompt",
            category="testbed",
            description="One prompt per line, such as \"red apple on blue and pink\". Empty text is the null prompt.",
            inputs=[io.String.Input("prompts", multiline=True, default="red apple on blue")],
            outputs=[io.Conditioning.Output("conditioning")],
        )

    @classmethod
    def execute(cls, prompts):
        codec = Codec.load(TEXT)
        lines = [line for line in prompts.splitlines() if line.strip()] or [""]
        context, pooled = codec.embed(codec.tokens(lines))
        return io.NodeOutput([[context, {"pooled_output": pooled}]])


class EmojiDecode(io.ComfyNode):
    """Turns latents of the emoji model into pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EmojiDecode",
            display_name="Emoji Decode",
            category="testbed",
            description="Decodes emoji latents, and enlarges the pixels by a whole number.",
            inputs=[io.Latent.Input("samples"), io.Int.Input("scale", default=1, min=1, max=16)],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, samples, scale):
        latents = comfy.latent_formats.SD3().process_in(samples["samples"].float().cpu())
        pictures = Codec.load(TEXT).decode(latents)
        large = pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return io.NodeOutput(large.permute(0, 2, 3, 1))


class TestbedExtension(ComfyExtension):
    """Hands the nodes to ComfyUI."""

    async def get_node_list(self):
        return [EmojiPrompt, EmojiDecode]


async def comfy_entrypoint():
    """What ComfyUI calls when it loads the package."""
    return TestbedExtension()
