"""Low-rank changes of linear layers: put into a network for training, stored as the host's LoRA loader reads them."""

import re

import torch


class Changed(torch.nn.Module):
    """A linear layer that stays as it is, plus a trained product of two thin matrices, zero at first."""

    def __init__(self, layer: torch.nn.Module, rank: int) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        self.layer = layer
        self.down = torch.nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = torch.nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the change."""
        return self.layer(x) + torch.nn.functional.linear(torch.nn.functional.linear(x, self.down), self.up)


def insert(model: torch.nn.Module, layers: str, rank: int) -> dict[str, torch.nn.Parameter]:
    """Freeze the model and change the layers whose names match; returns the new weights by the names in a LoRA file."""
    model.requires_grad_(False)
    chosen = [name for name, module in model.named_modules() if hasattr(module, "weight") and re.search(layers, name)]
    weights = {}
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        changed = Changed(model.get_submodule(name), rank)
        setattr(model.get_submodule(parent), leaf, changed)
        weights |= {f"diffusion_model.{name}.lora_{end}.weight": getattr(changed, end) for end in ("up", "down")}
    return weights
