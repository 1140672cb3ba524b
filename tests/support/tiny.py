"""Tiny random-weight models of the host's families, built through its own classes.

One entry of SPECS per family: the host's class in `comfy.supported_models`, its configuration,
the shapes of conditioning (`ctx`: tokens and width) and latent (`lat`), and what else it needs.
"""

import dataclasses
import inspect

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import pytest
import torch

CPU = torch.device("cpu")

# fmt: off
SPECS = {
    "sd15": dict(
        cls="SD15",
        cfg=dict(use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False,
                 adm_in_channels=None, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1,
                 1], transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], channel_mult=[1, 2],
                 transformer_depth_middle=1, use_linear_in_transformer=False, context_dim=48,
                 use_temporal_resblock=False, use_temporal_attention=False),
        ctx=(77, 48), lat=(4, 16, 16)),
    "sdxl": dict(
        cls="SDXL",
        cfg=dict(use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False,
                 num_classes="sequential", adm_in_channels=2816, in_channels=4, out_channels=4,
                 model_channels=64, num_res_blocks=[1, 1], transformer_depth=[0, 1],
                 transformer_depth_output=[1, 1, 0, 0], channel_mult=[1, 2], transformer_depth_middle=1,
                 use_linear_in_transformer=True, context_dim=48, use_temporal_resblock=False,
                 use_temporal_attention=False),
        ctx=(77, 48), pooled=1280, lat=(4, 16, 16)),
    "sd3": dict(
        cls="SD3",
        cfg=dict(in_channels=16, patch_size=2, out_channels=16, depth=3, input_size=None,
                 adm_in_channels=2048, context_embedder_config={"target": "torch.nn.Linear", "params":
                 {"in_features": 64, "out_features": 192}}, num_patches=256, pos_embed_max_size=16,
                 pos_embed_scaling_factor=None, x_block_self_attn_layers=[]),
        ctx=(20, 64), pooled=2048, lat=(16, 16, 16)),
    "flux": dict(
        cls="Flux",
        cfg=dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=48,
                 hidden_size=64, mlp_ratio=4.0, num_heads=4, depth=2, depth_single_blocks=3, axes_dim=[4, 6,
                 6], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True),
        ctx=(20, 48), pooled=64, lat=(16, 16, 16)),
    "chroma": dict(
        cls="Chroma",
        cfg=dict(image_model="chroma", in_channels=64, out_channels=64, context_in_dim=48, hidden_size=64,
                 mlp_ratio=4.0, num_heads=4, depth=2, depth_single_blocks=3, axes_dim=[4, 6, 6],
                 theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=64, hidden_dim=64,
                 n_layers=2),
        ctx=(20, 48), pooled=64, lat=(16, 16, 16)),
    "wan": dict(
        cls="WAN21_T2V",
        cfg=dict(image_model="wan2.1", model_type="t2v", dim=128, out_dim=16, num_heads=1, ffn_dim=256,
                 num_layers=3, patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True,
                 cross_attn_norm=True, eps=1e-06, in_dim=16, text_dim=64),
        ctx=(20, 64), lat=(16, 3, 16, 16)),
    "wan_vace": dict(
        cls="WAN21_Vace",
        cfg=dict(image_model="wan2.1", model_type="vace", dim=128, out_dim=16, num_heads=1, ffn_dim=256,
                 num_layers=4, patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True,
                 cross_attn_norm=True, eps=1e-06, in_dim=16, text_dim=64, vace_in_dim=96, vace_layers=2),
        ctx=(20, 64), lat=(16, 3, 16, 16)),
    "hunyuan": dict(
        cls="HunyuanVideo",
        cfg=dict(image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16,
                 vec_in_dim=768, axes_dim=[16, 56, 56], meanflow=False, context_in_dim=64, hidden_size=128,
                 mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=2, theta=256, qkv_bias=True,
                 byt5=False, guidance_embed=True, use_cond_type_embedding=False, vision_in_dim=None),
        ctx=(20, 64), pooled=768, lat=(16, 3, 16, 16)),
    "ltxv": dict(
        cls="LTXV",
        cfg=dict(image_model="ltxv", in_channels=128, cross_attention_dim=64, attention_head_dim=16,
                 num_attention_heads=4, caption_channels=48, num_layers=3),
        ctx=(20, 48), lat=(128, 3, 4, 4), mask=True),
    "qwen": dict(
        cls="QwenImage",
        cfg=dict(image_model="qwen_image", in_channels=64, out_channels=16, num_layers=3,
                 attention_head_dim=16, num_attention_heads=4, joint_attention_dim=48, axes_dims_rope=(4, 6,
                 6)),
        ctx=(20, 48), lat=(16, 1, 16, 16)),
    "lumina2": dict(
        cls="Lumina2",
        cfg=dict(image_model="lumina2", patch_size=2, in_channels=16, dim=64, cap_feat_dim=48, n_layers=3,
                 qk_norm=True, n_heads=4, n_kv_heads=2, axes_dims=[4, 6, 6], axes_lens=[300, 512, 512],
                 ffn_dim_multiplier=4.0),
        ctx=(20, 48), lat=(16, 16, 16), mask=True),
    "predict2": dict(
        cls="CosmosT2IPredict2",
        cfg=dict(image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128,
                 in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=64,
                 concat_padding_mask=True, crossattn_emb_channels=48, pos_emb_cls="rope3d",
                 pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
                 use_adaln_lora=True, adaln_lora_dim=16, num_blocks=3, num_heads=4,
                 extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0,
                 rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
                 extra_h_extrapolation_ratio=1.0, extra_w_extrapolation_ratio=1.0,
                 extra_t_extrapolation_ratio=1.0, rope_enable_fps_modulation=False),
        ctx=(20, 48), lat=(16, 1, 16, 16)),
    "cosmos": dict(
        cls="CosmosT2V",
        cfg=dict(image_model="cosmos", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16,
                 out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=64,
                 block_config="FA-CA-MLP", concat_padding_mask=True, pos_emb_cls="rope3d",
                 pos_emb_learnable=False, pos_emb_interpolation="crop", block_x_format="THWBD",
                 affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=16, num_blocks=3, num_heads=4,
                 crossattn_emb_channels=48, extra_per_block_abs_pos_emb=True,
                 rope_h_extrapolation_ratio=1.0, rope_w_extrapolation_ratio=1.0,
                 rope_t_extrapolation_ratio=2.0, extra_per_block_abs_pos_emb_type="learnable"),
        ctx=(20, 48), lat=(16, 2, 16, 16)),
    "hidream": dict(
        cls="HiDream",
        cfg=dict(image_model="hidream", attention_head_dim=16, axes_dims_rope=[4, 6, 6],
                 caption_channels=[48, 48], max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1,
                 1, 1], num_attention_heads=4, num_routed_experts=4, num_activated_experts=2, num_layers=2,
                 num_single_layers=2, out_channels=16, patch_size=2, text_emb_dim=64),
        ctx=(20, 48), pooled=64, lat=(16, 16, 16), extra=dict(conditioning_llama3=(2, 20, 48))),
    "pixart": dict(
        cls="PixArtSigma",
        cfg=dict(image_model="pixart_sigma", num_heads=4, patch_size=2, hidden_size=72, in_channels=4,
                 depth=3, model_max_length=30, micro_condition=False, caption_channels=48, input_size=64,
                 pe_interpolation=1),
        ctx=(30, 48), lat=(4, 48, 48)),
    "mochi": dict(
        cls="GenmoMochi",
        cfg=dict(image_model="mochi_preview", depth=3, patch_size=2, num_heads=4, hidden_size_x=128,
                 hidden_size_y=64, mlp_ratio_x=96.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12,
                 qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0, patch_embed_bias=True,
                 posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False,
                 timestep_scale=1000.0, use_t5=True, t5_feat_dim=48, t5_token_length=20,
                 rope_theta=10000.0),
        ctx=(20, 48), lat=(12, 2, 8, 8), mask=True),
    "aura": dict(
        cls="AuraFlow",
        cfg=dict(max_seq=256, cond_seq_dim=48, n_double_layers=2, n_layers=4, dim=64, n_heads=4,
                 global_conddim=64),
        ctx=(20, 48), lat=(4, 16, 16)),
    "sd35": dict(
        cls="SD3",
        cfg=dict(in_channels=16, patch_size=2, out_channels=16, depth=3, input_size=None, qk_norm="rms",
                 adm_in_channels=2048, context_embedder_config={"target": "torch.nn.Linear", "params":
                 {"in_features": 64, "out_features": 192}}, num_patches=256, pos_embed_max_size=16,
                 pos_embed_scaling_factor=None, x_block_self_attn_layers=[0, 1]),
        ctx=(20, 64), pooled=2048, lat=(16, 16, 16)),
    "svd": dict(
        cls="SVD_img2vid",
        cfg=dict(use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False,
                 num_classes="sequential", adm_in_channels=768, in_channels=8, out_channels=4, model_channels=64,
                 num_res_blocks=[1, 1], transformer_depth=[0, 1], transformer_depth_output=[1, 1, 0, 0],
                 channel_mult=[1, 2], transformer_depth_middle=1, use_linear_in_transformer=True, context_dim=48,
                 use_temporal_resblock=True, use_temporal_attention=True, extra_ff_mix_layer=True,
                 merge_strategy="learned_with_images", video_kernel_size=[3, 1, 1]),
        ctx=(1, 48), lat=(4, 8, 8)),
    "wan_i2v": dict(
        cls="WAN21_I2V",
        cfg=dict(image_model="wan2.1", model_type="i2v", dim=128, out_dim=16, num_heads=1, ffn_dim=256,
                 num_layers=3, patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True,
                 cross_attn_norm=True, eps=1e-06, in_dim=36, text_dim=64),
        ctx=(20, 64), lat=(16, 3, 16, 16)),
    "wan_camera": dict(
        cls="WAN21_Camera",
        cfg=dict(image_model="wan2.1", model_type="camera", dim=128, out_dim=16, num_heads=1, ffn_dim=256,
                 num_layers=3, patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True,
                 cross_attn_norm=True, eps=1e-06, in_dim=32, text_dim=64),
        ctx=(20, 64), lat=(16, 3, 16, 16)),
    "hydit": dict(
        cls="HunyuanDiT",
        cfg=dict(image_model="hydit", hidden_size=64, depth=4, num_heads=4, text_states_dim=32,
                 text_states_dim_t5=32, text_len=20, text_len_t5=20, mlp_ratio=4.0, size_cond=False,
                 use_style_cond=False),
        ctx=(20, 32), lat=(4, 16, 16), mask=True,
        extra=dict(conditioning_mt5xl=(20, 32), attention_mask_mt5xl=(20,))),
    "omnigen2": dict(
        cls="Omnigen2",
        cfg=dict(image_model="omnigen2", hidden_size=64, num_layers=3, num_refiner_layers=1, num_attention_heads=4,
                 num_kv_heads=2, multiple_of=64, axes_dim_rope=(4, 6, 6), text_feat_dim=48, timestep_scale=1000.0),
        ctx=(20, 48), lat=(16, 16, 16), mask=True),
    "hunyuan3d": dict(
        cls="Hunyuan3Dv2",
        cfg=dict(image_model="hunyuan3d2", in_channels=64, context_in_dim=48, hidden_size=64, mlp_ratio=4.0,
                 num_heads=4, depth=2, depth_single_blocks=3, qkv_bias=True, guidance_embed=False),
        ctx=(20, 48), lat=(64, 32)),
}
# fmt: on

# Configuration keys that only some host versions know, with the value that the host gives such a model.
VERSIONED = {
    "flux": (comfy.ldm.flux.model.FluxParams, {"txt_ids_dims": []}),
    "flux2": (comfy.ldm.flux.model.FluxParams, {"txt_ids_dims": [3]}),
    "chroma": (comfy.ldm.chroma.model.ChromaParams, {"txt_ids_dims": [], "vec_in_dim": None}),
    "hunyuan": (comfy.ldm.hunyuan_video.model.HunyuanVideoParams, {"txt_ids_dims": [], "meanflow_sum": False}),
    "hunyuan15": (comfy.ldm.hunyuan_video.model.HunyuanVideoParams, {"txt_ids_dims": [], "meanflow_sum": True}),
    "hunyuan_refiner": (comfy.ldm.hunyuan_video.model.HunyuanVideoParams, {"txt_ids_dims": [], "meanflow_sum": False}),
}


def build(name, seed=0, dtype=torch.float32):
    """A ModelPatcher of the family on the CPU, with seeded random weights; skips where the host lacks the family."""
    kind = getattr(comfy.supported_models, SPECS[name]["cls"], None)
    if kind is None:
        pytest.skip(f"this host has no {SPECS[name]['cls']}")
    config = kind(_config(name))
    config.unet_config.update(_config(name))  # in place of what the class knows of the large ones
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    random_weights(model.diffusion_model, seed)
    model.eval()  # older hosts leave ACE-Step's dropout on
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def conditioning(name, seed, **extra):
    """A CONDITIONING of one random prompt for the family."""
    spec, g = SPECS[name], torch.Generator().manual_seed(seed)
    tokens, width = spec["ctx"]
    fields = {key: torch.randn(1, *shape, generator=g) for key, shape in spec.get("extra", {}).items()}
    if "pooled" in spec:
        fields["pooled_output"] = torch.randn(1, spec["pooled"], generator=g)
    if spec.get("mask"):
        fields["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return [[torch.randn(1, tokens, width, generator=g), {**fields, **extra}]]


def sample(
    patcher,
    name,
    steps=8,
    cfg=4.0,
    sampler="euler",
    scheduler="simple",
    batch=1,
    positive=None,
    negative=None,
    latent=None,
    seed=3,
    **options,
):
    """Sample the family as a KSampler node does; returns the latent."""
    if latent is None:
        latent = torch.zeros((batch, *SPECS[name]["lat"]))
    latent = comfy.sample.fix_empty_latent_channels(patcher, latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        patcher,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or conditioning(name, 1),
        negative or conditioning(name, 2),
        latent,
        seed=seed,
        disable_pbar=True,
        **options,
    )


def self_attention(network):
    """The self-attention modules of an SD UNet or SD3 network."""
    names = ("attn1", "x_block.attn", "context_block.attn")
    return [module for name, module in network.named_modules() if name.endswith(names)]


def _config(name):
    config = dict(SPECS[name]["cfg"])
    if name not in VERSIONED:
        return config
    owner, further = VERSIONED[name]
    known = (
        {f.name for f in dataclasses.fields(owner)}
        if dataclasses.is_dataclass(owner)
        else set(inspect.signature(owner.__init__).parameters)
    )
    return {key: value for key, value in {**further, **config}.items() if key in known | {"image_model"}}


def random_weights(network, seed):
    g = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()], key=lambda p: p[0]):
        if tensor.dtype.is_floating_point:
            with torch.no_grad():
                tensor.copy_(_random(name, tensor.shape, g))


def _random(name, shape, generator):
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.01 * values if name.endswith(("weight", "scale")) else 0.02 * values
    return values / max(shape[-1], 1) ** 0.5 if len(shape) > 1 else values
