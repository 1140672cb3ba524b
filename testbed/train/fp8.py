"""Weights in 8 bits, as the host reads them: linear layers in e4m3 with a scale each, the rest in fp16."""

import torch

MARK, SCALE, KIND = "scaled_fp8", ".scale_weight", torch.float8_e4m3fn


def squeeze(weights: dict[str, torch.Tensor], linear: set[str]) -> dict[str, torch.Tensor]:
    """The weights with those of the layers named in `linear` in 8 bits."""
    stored = {MARK: torch.zeros(2, dtype=KIND)}
    for name, weight in weights.items():
        layer, _, leaf = name.rpartition(".")
        if layer in linear and leaf == "weight":
            scale = weight.abs().max() / torch.finfo(KIND).max
            stored[name], stored[layer + SCALE] = (weight / scale).to(KIND), scale.reshape(()).float()
        else:
            stored[name] = weight.half()
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def widen(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a file, in 8 bits or not, in fp32."""
    scales = {name.removesuffix(SCALE): scale for name, scale in stored.items() if name.endswith(SCALE)}
    return {
        name: weight.float() * (scales.get(name.rpartition(".")[0], 1.0) if weight.dtype == KIND else 1.0)
        for name, weight in stored.items()
        if name != MARK and not name.endswith(SCALE)
    }
