"""Tiny models of families that only newer hosts have, with what only they are given."""

from typing import Any

import comfy.supported_models
import pytest
import torch

from support import further, tiny

# fmt: off
# As SPECS of `tiny`, with: blocks, the lists that are reused, in the order they run; given, further fields of the
# conditioning; audio, the shape of a sound track beside the video; mixes: the host's own result for a latent depends on
# what else is in its batch.
NEWER: dict[str, dict[str, Any]] = {
    "minimax_h3": dict(
        cls="MiniMaxH3",
        cfg=dict(image_model="minimax_h3", hidden_size=64, num_layers=3, token_refiner_num_layers=1,
                 num_attention_heads=4, attention_head_dim=16, ffn_hidden_size=128, text_dim=48,
                 time_embed_hidden_size=64, time_embed_dim=32, rope_inv_freq_len=2),
        ctx=(20, 48), lat=(24, 3, 8, 8), audio=(32, 2, 6), blocks=["blocks"]),
    "krea2": dict(
        cls="Krea2",
        cfg=dict(image_model="krea2", features=64, tdim=32, txtdim=16, heads=4, kvheads=2, layers=3, txtlayers=2,
                 txtheads=2, txtkvheads=2),
        ctx=(20, 32), lat=(16, 1, 16, 16), blocks=["blocks"]),
    "kandinsky5": dict(
        cls="Kandinsky5",
        cfg=dict(image_model="kandinsky5", in_text_dim=48, in_text_dim2=64, time_dim=32, model_dim=64, ff_dim=128,
                 visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6)),
        ctx=(20, 48), pooled=64, lat=(16, 3, 16, 16), blocks=["visual_transformer_blocks"]),
    "cogvideox": dict(
        cls="CogVideoX_T2V",
        cfg=dict(image_model="cogvideox", num_attention_heads=4, attention_head_dim=16, time_embed_dim=32,
                 text_embed_dim=48, num_layers=3, use_rotary_positional_embeddings=True),
        ctx=(20, 48), lat=(16, 3, 16, 16), blocks=["blocks"]),
    "wan_animate2": dict(
        cls="WAN_Animate2", cfg=dict(further.WAN, model_type="animate2", in_dim=36), **further.VIDEO,
        blocks=["blocks"]),
    "ernie": dict(
        cls="ErnieImage",
        cfg=dict(image_model="ernie", hidden_size=64, num_attention_heads=4, num_layers=3, ffn_hidden_size=128,
                 text_in_dim=48, rope_axes_dim=(4, 6, 6)),
        ctx=(20, 48), lat=(128, 8, 8), blocks=["layers"]),
    "lens": dict(
        cls="Lens",
        cfg=dict(image_model="lens", num_layers=3, attention_head_dim=16, num_attention_heads=4, enc_hidden_dim=48,
                 axes_dims_rope=(4, 6, 6), selected_layer_index=(0, 1)),
        ctx=(20, 96), lat=(128, 8, 8), blocks=["transformer_blocks"]),
    "mage_flow": dict(
        cls="MageFlow",
        cfg=dict(image_model="mage_flow", num_layers=3, attention_head_dim=16, num_attention_heads=4,
                 joint_attention_dim=48, axes_dims_rope=(4, 6, 6)),
        ctx=(20, 48), lat=(128, 8, 8), blocks=["transformer_blocks"]),
    "joyimage": dict(
        cls="JoyImage",
        cfg=dict(image_model="joyimage", hidden_size=64, num_attention_heads=4, text_dim=48, num_layers=3,
                 rope_dim_list=[4, 6, 6]),
        ctx=(20, 48), lat=(16, 1, 16, 16), blocks=["double_blocks"]),
    "ideogram4": dict(
        cls="Ideogram4",
        cfg=dict(image_model="ideogram4", num_layers=3, num_attention_heads=4, attention_head_dim=16,
                 intermediate_size=128, adaln_dim=32, llm_features_dim=48, mrope_section=(4, 2, 2)),
        ctx=(20, 48), lat=(128, 8, 8), blocks=["layers"]),
    "boogu": dict(
        cls="Boogu",
        cfg=dict(image_model="boogu", hidden_size=64, num_layers=3, num_double_stream_layers=2, num_refiner_layers=1,
                 num_attention_heads=4, num_kv_heads=2, multiple_of=64, axes_dim_rope=(4, 6, 6),
                 axes_lens=(300, 64, 64), instruction_feat_dim=48),
        ctx=(20, 48), mask=True, lat=(16, 16, 16), blocks=["double_stream_layers", "single_stream_layers"]),
    "pixeldit": dict(
        cls="PixelDiTT2I",
        cfg=dict(image_model="pixeldit_t2i", num_groups=4, hidden_size=64, pixel_hidden_size=8,
                 pixel_attn_hidden_size=64, pixel_num_groups=4, patch_depth=3, patch_size=4, txt_embed_dim=48,
                 txt_max_length=32),
        ctx=(20, 48), lat=(3, 16, 16), blocks=["patch_blocks"]),
    "ace15": dict(
        cls="ACEStep15",
        cfg=dict(audio_model="ace1.5", hidden_size=64, text_hidden_dim=48, num_dit_layers=3, num_lyric_layers=1,
                 num_timbre_layers=1, num_tokenizer_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
                 intermediate_size=128, encoder_hidden_size=64, encoder_intermediate_size=128, encoder_num_heads=4,
                 fsq_dim=64),
        ctx=(20, 48), lat=(64, 32), given={"conditioning_lyrics": (1, 12, 48)}, mixes=True, blocks=["decoder.layers"]),
    "hunyuan_refiner": dict(
        cls="HunyuanImage21Refiner",
        cfg=dict(image_model="hunyuan_video", in_channels=128, patch_size=[1, 1, 1], out_channels=64, vec_in_dim=None,
                 axes_dim=[16, 56, 56], meanflow=False, context_in_dim=64, hidden_size=128, mlp_ratio=4.0,
                 num_heads=1, depth=2, depth_single_blocks=2, theta=256, qkv_bias=True, byt5=False,
                 guidance_embed=True, use_cond_type_embedding=False, vision_in_dim=None),
        ctx=(20, 64), lat=(64, 2, 8, 8), blocks=["double_blocks", "single_blocks"]),
}
# fmt: on
# Those whose entry counts: the others are found.
ENTERED = {
    "minimax_h3": "MiniMax H3",
    "wan_animate2": "Wan Animate 2",
    "ace15": "ACE-Step 1.5",
    "hunyuan_refiner": "HunyuanVideo",
}


def know_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `tiny` know the families above for as long as a test runs."""
    for name, spec in NEWER.items():
        monkeypatch.setitem(tiny.SPECS, name, spec)


def lacks(name: str) -> str | None:
    """Why this host cannot run a family, None where it can."""
    cls = NEWER[name]["cls"]
    return None if hasattr(comfy.supported_models, cls) else f"this ComfyUI has no {cls}"


def given(name: str, seed: int) -> list[Any]:
    """A conditioning with all that the family is given."""
    generator = torch.Generator().manual_seed(10 + seed)
    fields = NEWER[name].get("given", {})
    return tiny.conditioning(name, seed, **{f: torch.randn(shape, generator=generator) for f, shape in fields.items()})
