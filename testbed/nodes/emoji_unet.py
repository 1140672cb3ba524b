"""The small UNet: the host's SD 1.5 classes with other numbers, which its loader would not accept."""

import functools
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

CONFIG = {
    "image_size": 32,
    "in_channels": 16,
    "out_channels": 16,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 128,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "use_checkpoint": False,
    "adm_in_channels": None,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}


class EmojiUNet(comfy.supported_models.SD15):
    """SD 1.5 (noise prediction, its beta schedule) with latents of 16 channels."""

    latent_format = comfy.latent_formats.SD3
    unet_extra_config: ClassVar[dict[str, Any]] = {}

    def inpaint_model(self):
        """More than four channels mean no mask here."""
        return False


def network(dtype):
    """The network alone, without weights."""
    return UNetModel(**CONFIG, dtype=dtype, operations=comfy.ops.disable_weight_init)


@functools.cache
def model_sampling():
    """The host's noise schedule of SD 1.5."""
    return comfy.model_sampling.ModelSamplingDiscrete()


def load(path):
    """The model with the weights of a safetensors file, a ModelPatcher on the host's devices."""
    weights = comfy.utils.load_torch_file(str(path))
    config = EmojiUNet(dict(CONFIG))
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, "")
    model.load_model_weights(weights, "")
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
