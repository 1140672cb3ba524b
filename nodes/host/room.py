"""How much memory the host leaves for features."""

from __future__ import annotations

from typing import Any

import comfy.model_management as host_memory
import torch

# Features may take this share of the memory that the host reports free beyond what it needs to sample, and this one of
# free main memory may be page-locked for them.
SHARE, PINNED_SHARE = 0.5, 0.25


def free_bytes(model: Any, device: torch.device, needed: int) -> int:
    """Bytes that features of a MODEL (ModelPatcher) may take on a device; needed: bytes to sample.

    On a GPU, weights that the host takes out when memory is short (dynamic VRAM) count as free where it tells them.
    """
    tells = device.type != "cpu" and hasattr(model, "get_free_memory")
    free = (model if tells else host_memory).get_free_memory(device)
    return int(max(free - max(needed, host_memory.minimum_inference_memory()), 0) * SHARE)


def pinned_bytes() -> int:
    """Bytes of main memory that may be page-locked for features: what the host would lock beside its own, where it
    tells; none where it locks none itself."""
    left = getattr(host_memory, "MAX_PINNED_MEMORY", float("inf")) - getattr(host_memory, "TOTAL_PINNED_MEMORY", 0)
    share = host_memory.get_free_memory(torch.device("cpu")) * PINNED_SHARE
    return int(max(min(left, share), 0))
