"""The small photograph model: the host's Lumina 2 classes with other numbers, which its loader would not accept."""

import inspect
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.lumina.model import NextDiT

SHIFT = 3.0
CONFIG: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 128,
    "cap_feat_dim": 128,
    "n_layers": 5,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512],
    "ffn_dim_multiplier": 3.0,
    "multiple_of": 32,
    "time_scale": 1000.0,
}


class PhotosLumina(comfy.supported_models.Lumina2):
    """Lumina 2 (flow) with a smaller shift, and latents as they are in training."""

    sampling_settings: ClassVar[dict[str, Any]] = {"multiplier": 1.0, "shift": SHIFT}
    latent_format = comfy.latent_formats.SD3


def runs_here() -> bool:
    """Can this host run it? Lumina 2 before 0.3.75 has no scale of times."""
    return "time_scale" in inspect.signature(NextDiT).parameters


def network(operations: Any = comfy.ops.disable_weight_init) -> NextDiT:
    """The network alone, without weights."""
    return NextDiT(**CONFIG, dtype=torch.float32, operations=operations)


def load(path: Path) -> comfy.model_patcher.ModelPatcher:
    """The model with the weights of a safetensors file, on the host's devices."""
    config = PhotosLumina(dict(CONFIG))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    model.load_model_weights(comfy.utils.load_torch_file(str(path)), "")
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
