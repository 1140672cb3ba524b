"""Tiny models of further families of the host, with what only they are given: audio, poses, lyrics."""

from typing import Any

import comfy.ldm.audio.embedders
import comfy.supported_models
import pytest
import torch

from support.features import ATTENTION, STACKED
from support.tiny import SPECS, conditioning

# fmt: off
WAN = dict(image_model="wan2.1", dim=128, out_dim=16, num_heads=1, ffn_dim=256, num_layers=3, patch_size=(1, 2, 2),
           freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-06, in_dim=16, text_dim=64)
VIDEO = dict(ctx=(20, 64), lat=(16, 3, 8, 8))
FURTHER = {
    "flux2": dict(
        cls="Flux2",
        cfg=dict(image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=48,
                 hidden_size=64, mlp_ratio=3.0, num_heads=4, depth=2, depth_single_blocks=3, axes_dim=[4, 4, 4, 4],
                 theta=2000, patch_size=1, qkv_bias=False, guidance_embed=True, global_modulation=True,
                 mlp_silu_act=True, ops_bias=False, default_ref_method="index", ref_index_scale=10.0),
        ctx=(20, 48), pooled=64, lat=(128, 8, 8)),
    "hunyuan15": dict(
        cls="HunyuanVideo15",
        cfg=dict(image_model="hunyuan_video", in_channels=65, patch_size=[1, 1, 1], out_channels=32, vec_in_dim=None,
                 axes_dim=[16, 56, 56], meanflow=False, context_in_dim=64, hidden_size=128, mlp_ratio=4.0, num_heads=1,
                 depth=2, depth_single_blocks=2, theta=256, qkv_bias=True, byt5=False, guidance_embed=False,
                 use_cond_type_embedding=True, vision_in_dim=1152),
        ctx=(20, 64), pooled=768, lat=(32, 3, 8, 8)),
    "hunyuan3d21": dict(
        cls="Hunyuan3Dv2_1",
        cfg=dict(image_model="hunyuan3d2_1", in_channels=64, hidden_size=64, context_dim=48, depth=5, num_heads=4,
                 qkv_bias=False, num_moe_layers=0, guidance_cond_proj_dim=None),
        ctx=(20, 48), lat=(64, 32)),
    "ace": dict(
        cls="ACEStep",
        cfg=dict(audio_model="ace", num_layers=3, attention_head_dim=16, num_attention_heads=4, mlp_ratio=2.0,
                 text_embedding_dim=48, lyric_encoder_vocab_size=32, lyric_hidden_size=1024, ssl_latent_dims=[8, 8]),
        ctx=(20, 48), lat=(8, 16, 24)),
    "audio": dict(
        cls="TinyStableAudio",
        cfg=dict(audio_model="dit1.0", io_channels=64, embed_dim=64, cond_token_dim=768, project_cond_tokens=True,
                 depth=3, num_heads=1, global_cond_dim=1536),
        ctx=(20, 768), lat=(64, 32)),
    "wan_s2v": dict(
        cls="WAN22_S2V",
        cfg=dict(WAN, model_type="s2v", audio_dim=32, cond_dim=16, audio_inject_layers=[0, 2]), **VIDEO),
    "wan_humo": dict(cls="WAN21_HuMo", cfg=dict(WAN, model_type="humo"), **VIDEO),
    "wan_animate": dict(cls="WAN22_Animate", cfg=dict(WAN, model_type="animate", in_dim=36), **VIDEO),
}
# What they are given beside text: {field of the conditioning: its shape}.
GIVEN = {
    "wan_s2v": {"audio_embed": (1, 25, 32, 12)},
    "wan_humo": {"audio_embed": (1, 3, 8, 5, 1280)},
    "wan_animate": {"pose_video_latent": (1, 16, 2, 8, 8)},
}
# Reference latents are tokens beside the latent's own.
REFERENCE = {"wan_s2v", "wan_humo", "flux2"}
# The host runs it on pairs of branches only: it takes its batch apart in the middle.
PAIRED = {"hunyuan3d21"}
# fmt: on
FURTHER_CASES = [(name, kind) for name in FURTHER for kind in (*ATTENTION.get(name, ()), *STACKED[name])]


class TinyStableAudio(comfy.supported_models.StableAudio):
    """Stable Audio with the weights that its class asks for when it is made."""

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Any:
        generator = torch.Generator().manual_seed(0)
        embedder = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=512).state_dict()
        weights = {key: torch.randn(value.shape, generator=generator) / 30 for key, value in embedder.items()}
        return super().get_model(
            {
                f"conditioner.conditioners.{which}.{key}": value
                for key, value in weights.items()
                for which in ("seconds_start", "seconds_total")
            },
            prefix,
            device,
        )


def know_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `tiny` know the families above for as long as a test runs."""
    monkeypatch.setattr(comfy.supported_models, "TinyStableAudio", TinyStableAudio, raising=False)
    for name, spec in FURTHER.items():
        monkeypatch.setitem(SPECS, name, spec)


def given(name: str, seed: int) -> list[Any]:
    """A conditioning with all that the family is given."""
    generator = torch.Generator().manual_seed(10 + seed)
    fields = {field: torch.randn(shape, generator=generator) for field, shape in GIVEN.get(name, {}).items()}
    if name == "ace":
        fields["conditioning_lyrics"] = torch.randint(32, (1, 12), generator=generator)
    if name in REFERENCE:
        shape = SPECS[name]["lat"]
        fields["reference_latents"] = [
            torch.randn(1, shape[0], *([1] * (len(shape) - 3)), *shape[-2:], generator=generator)
        ]
    return conditioning(name, seed, **fields)


def options(name: str) -> dict[str, Any]:
    """What to sample: two different latents where the host runs the branches apart too."""
    return {"positive": given(name, 1), "negative": given(name, 2), "batch": 1 if name in PAIRED else 2}
