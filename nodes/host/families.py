"""Where each model family keeps what can be reused: one entry of data a family.

Names, paths and signatures are those of the host's own classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...fastercache_core.clock import Interval
from .model_call import uncompiled

# Kinds of sites. self, temporal, cross: attention outputs, after the projection and before the gate; temporal:
# self-attention over time alone. front, rear, stack: what the first half, the second half or all blocks but the first
# add to their input. deep: a UNet's inside, up to its last level. branch: ResBlock first halves and transformer
# branches.
ATTENTION = ("self", "temporal", "cross")
SPANS = ("front", "rear", "stack")
# Each of these leaves out more than half of a pass.
DEEP = {"stack", "deep"}


@dataclass(frozen=True)
class Attention:
    """An attention at `path` inside every block of class `block` or of one derived from it.

    inside: the name of the list that these blocks lie in, where others of the class lie elsewhere. joint: further
    paths, where the block runs one attention over the tokens of all of these modules, between their `pre_attention` and
    `post_attention`; otherwise a module's `forward` is the attention.
    """

    block: str
    path: str
    kind: str = "self"
    joint: tuple[str, ...] | None = None
    inside: str = ""


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after the other.

    streams: what a block takes and gives back, in the order that it gives it: names of arguments, places among them, or
    (one of these, a place in the tuple that is given there). whole: True where the blocks hand values past each other,
    so that only the stack as a whole can be reused. beside: a path of blocks that run beside these, each after one of
    them and adding to what it gives, and the path of {number of the block: number of the one beside it}. method: what
    the host calls of a block. aside: place of the argument that says how many of the tokens (second axis) come before
    those of the latent; calls on them alone, which fill a cache of the host, always run.
    """

    path: str
    streams: tuple[Any, ...] = (0,)
    whole: bool = False
    beside: tuple[str, str] | None = None
    method: str = "forward"
    aside: int | None = None


@dataclass(frozen=True)
class Family:
    """A family of diffusion models: full class names, and where things are inside. An entry before another counts.

    part: class name of a module that they have, where the model's own class does not tell. batch_axis: axis of the
    batch in features, None where they have no such: the host runs the branches one by one. opaque: class names of
    modules that choose by values what they run, with an output shaped as their input. unet: True where `input_blocks`,
    `middle_block` and `output_blocks` are those of the host's UNet. known: False for a model of no family, where
    attention is taken as the host calls it, and `stacks` are those that a pass of it showed.
    """

    name: str
    models: tuple[str, ...]
    attention: tuple[Attention, ...] = ()
    stacks: tuple[Stack, ...] = ()
    batch_axis: int | None = 0
    opaque: tuple[str, ...] = ()
    unet: bool = False
    known: bool = True
    part: str = ""

    def kinds(self) -> set[str]:
        """The kinds of sites that this family has."""
        kinds = {entry.kind for entry in self.attention} if self.known else {"self", "cross"}
        if self.stacks:
            kinds |= {"stack"} if any(stack.whole for stack in self.stacks) else set(SPANS)
        return kinds | ({"deep", "branch"} if self.unet else set())


# fmt: off
UNET = "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel"
FAMILIES = (
    Family("SVD", (UNET,),
           (Attention("BasicTransformerBlock", "attn1", "temporal", inside="time_stack"),
            Attention("BasicTransformerBlock", "attn1", inside="transformer_blocks"),
            Attention("BasicTransformerBlock", "attn2", "cross")),
           unet=True, part="SpatialVideoTransformer"),
    Family("SD UNet", (UNET,),
           (Attention("BasicTransformerBlock", "attn1"), Attention("BasicTransformerBlock", "attn2", "cross")),
           unet=True),
    Family("SD3", ("comfy.ldm.modules.diffusionmodules.mmdit.MMDiT",),
           (Attention("JointBlock", "x_block.attn", joint=("context_block.attn",)),
            Attention("JointBlock", "x_block.attn2", joint=())),
           (Stack("joint_blocks", (0, 1)),)),
    Family("Flux, Chroma, Hunyuan3D 2", ("comfy.ldm.flux.model.Flux", "comfy.ldm.chroma.model.Chroma",
                                         "comfy.ldm.hunyuan3d.model.Hunyuan3Dv2"),
           stacks=(Stack("double_blocks", ("img", "txt")), Stack("single_blocks"))),
    Family("HunyuanVideo", ("comfy.ldm.hunyuan_video.model.HunyuanVideo",),
           stacks=(Stack("double_blocks", ("img", "txt")), Stack("single_blocks"))),
    Family("Wan Animate 2", ("comfy.ldm.wan.model_animate2.WanAnimate2Model",),  # derived from Wan's own: before it
           stacks=(Stack("blocks", method="forward_gen"),)),
    Family("Wan", ("comfy.ldm.wan.model.WanModel",),
           (Attention("WanAttentionBlock", "self_attn"), Attention("WanAttentionBlock", "cross_attn", "cross")),
           (Stack("blocks", beside=("vace_blocks", "vace_layers_mapping")),)),
    Family("LTXV with audio", ("comfy.ldm.lightricks.av_model.LTXAVModel",),  # derived from LTXV's own: before it
           (Attention("BasicAVTransformerBlock", "attn1"), Attention("BasicAVTransformerBlock", "audio_attn1"),
            Attention("BasicAVTransformerBlock", "attn2", "cross"),
            Attention("BasicAVTransformerBlock", "audio_attn2", "cross"),
            Attention("BasicAVTransformerBlock", "audio_to_video_attn", "cross"),
            Attention("BasicAVTransformerBlock", "video_to_audio_attn", "cross")),
           (Stack("transformer_blocks", ((0, 0), (0, 1))),)),
    Family("LTXV", ("comfy.ldm.lightricks.model.LTXVModel",),
           (Attention("BasicTransformerBlock", "attn1"), Attention("BasicTransformerBlock", "attn2", "cross")),
           (Stack("transformer_blocks"),)),
    Family("Qwen-Image", ("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",),
           (Attention("QwenImageTransformerBlock", "attn"),),
           (Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),)),
    Family("Qwen-Image 2.1", ("comfy.ldm.qwen_image21.model.QwenImage21Transformer2DModel",),
           stacks=(Stack("transformer_blocks", aside=4),)),
    Family("Lumina2, Z-Image", ("comfy.ldm.lumina.model.NextDiT",),
           (Attention("JointTransformerBlock", "attention"),), (Stack("layers"),)),
    Family("OmniGen2", ("comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",),
           (Attention("OmniGen2TransformerBlock", "attn"),), (Stack("layers"),)),
    Family("Cosmos", ("comfy.ldm.cosmos.model.GeneralDIT",),
           (Attention("GeneralDITTransformerBlock", "blocks.0.block"),
            Attention("GeneralDITTransformerBlock", "blocks.1.block", "cross")),
           (Stack("blocks"),), batch_axis=3),
    Family("Cosmos Predict2", ("comfy.ldm.cosmos.predict2.MiniTrainDIT",),
           (Attention("Block", "self_attn"), Attention("Block", "cross_attn", "cross")), (Stack("blocks"),)),
    Family("HiDream", ("comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",),
           (Attention("HiDreamImageTransformerBlock", "attn1"),
            Attention("HiDreamImageSingleTransformerBlock", "attn1")),
           (Stack("double_stream_blocks", ("image_tokens", "text_tokens")),
            Stack("single_stream_blocks", ("image_tokens",))), opaque=("MOEFeedForwardSwiGLU",)),
    Family("PixArt", ("comfy.ldm.pixart.pixartms.PixArtMS",),
           (Attention("PixArtMSBlock", "attn"), Attention("PixArtMSBlock", "cross_attn", "cross")),
           (Stack("blocks"),)),
    Family("HunyuanDiT", ("comfy.ldm.hydit.models.HunYuanDiT",),
           (Attention("HunYuanDiTBlock", "attn1"), Attention("HunYuanDiTBlock", "attn2", "cross")),
           (Stack("blocks", whole=True),)),
    Family("Hunyuan3D 2.1", ("comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",),
           (Attention("HunYuanDiTBlock", "attn1"), Attention("HunYuanDiTBlock", "attn2", "cross")),
           (Stack("blocks", whole=True),)),
    Family("Mochi", ("comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",),
           (Attention("AsymmetricJointBlock", "attn"),), (Stack("blocks", (0, 2)),)),
    Family("AuraFlow", ("comfy.ldm.aura.mmdit.MMDiT",),
           (Attention("MMDiTBlock", "attn"), Attention("DiTBlock", "attn")),
           (Stack("double_layers", (0, 1)), Stack("single_layers"))),
    Family("ACE-Step", ("comfy.ldm.ace.model.ACEStepTransformer2DModel",),
           (Attention("LinearTransformerBlock", "attn"), Attention("LinearTransformerBlock", "cross_attn", "cross")),
           (Stack("transformer_blocks", ("hidden_states",)),)),
    Family("ACE-Step 1.5", ("comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel",),
           (Attention("AceStepDiTLayer", "self_attn"), Attention("AceStepDiTLayer", "cross_attn", "cross")),
           (Stack("decoder.layers", ("hidden_states",)),)),
    Family("MiniMax H3", ("comfy.ldm.minimax.model.MiniMaxH3Model",), (Attention("DiTBlock", "attn"),),
           (Stack("blocks"),), batch_axis=None),
    Family("Stable Audio", ("comfy.ldm.audio.dit.AudioDiffusionTransformer",),
           (Attention("TransformerBlock", "self_attn"), Attention("TransformerBlock", "cross_attn", "cross")),
           (Stack("transformer.layers"),)),
)
# fmt: on

# What is reused instead where a family has no such sites, nearest first.
INSTEAD = {
    "self": ("front", "stack"),
    "branch": ("self", "front"),
    "deep": ("stack", "self"),
    "front": ("deep", "stack", "self"),
    "rear": ("deep", "stack", "self"),
    "stack": ("deep", "self"),
}


def find_family(diffusion_model: Any) -> Family:
    """The entry for a diffusion model or any class it derives from; one that is not `known` when there is none."""
    bases = {f"{c.__module__}.{c.__qualname__}" for c in type(diffusion_model).__mro__}
    parts = {"", *(type(module).__name__ for module in diffusion_model.modules())}
    unknown = Family(type(diffusion_model).__name__, (), known=False)
    return next((family for family in FAMILIES if bases & set(family.models) and family.part in parts), unknown)


def family_of(model: Any) -> Family:
    """The entry for a MODEL (ModelPatcher), see `find_family`."""
    return find_family(uncompiled(model.model.diffusion_model))


def available(family: Family, intervals: Mapping[str, Interval]) -> tuple[dict[str, Interval], dict[str, str | None]]:
    """`intervals` for the kinds that `family` has, and what had to be replaced: {kind: other kind}.

    Cross attention has no replacement: where there is none, there is nothing to reuse. Attention over time needs none:
    where it is not alone, it is part of self.
    """
    has = family.kinds()
    chosen: dict[str, Interval] = {}
    replaced: dict[str, str | None] = {}
    for kind, interval in intervals.items():
        if kind == "temporal" and kind not in has:
            continue
        other = next((k for k in (kind, *INSTEAD.get(kind, ())) if k in has), None)
        if other:
            chosen.setdefault(other, interval)
        if other != kind:
            replaced[kind] = other
    return chosen, replaced
