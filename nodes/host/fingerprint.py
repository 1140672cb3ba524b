"""Which model this is, and which size of picture: short texts, stored with a policy."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

from .model_call import uncompiled

# So many parameters are looked at; one-dimensional ones, which LoRAs leave alone.
PARAMETERS = 16
# Sizes are of one class whose numbers of places in the latent are within this factor, whatever their proportions.
SAME_CLASS = 1.25
SIZE = re.compile(r"[0-9]{1,6}(x[0-9]{1,6})*")


def model_fingerprint(model: Any) -> str:
    """Class, size and a digest of some weights of a MODEL (ModelPatcher), e.g. "SD3 9.1M 3f2a90bc".

    The same for every precision of the file and with or without LoRAs; another checkpoint of the same architecture has
    another one.
    """
    parameters = sorted(uncompiled(model.model.diffusion_model).named_parameters())
    shapes = [f"{name} {tuple(p.shape)}" for name, p in parameters]
    small = [p for _, p in parameters if p.ndim == 1 and p.numel() > 1]
    chosen = small[:: max(len(small) // PARAMETERS, 1)][:PARAMETERS]
    values = [f"{float(p.detach().float().abs().mean()):.1e}" for p in chosen]
    digest = hashlib.sha256("\n".join([*shapes, *values]).encode()).hexdigest()[:8]
    millions = sum(p.numel() for _, p in parameters) / 1e6
    return f"{type(model.model).__name__} {millions:.1f}M {digest}"


def size_of(shape: Sequence[int]) -> str:
    """The size of latents of this shape [batch, channels, ...], e.g. "128x128", of clips "21x60x104"."""
    return "x".join(str(n) for n in shape[2:])


def other_size(size: str, other: str) -> bool:
    """True when two sizes (see `size_of`) are of different classes: one has far more places. False for other texts."""
    if not (SIZE.fullmatch(size) and SIZE.fullmatch(other)):
        return False
    places, others = (math.prod(int(n) for n in text.split("x")) for text in (size, other))
    return max(places, others) > SAME_CLASS * min(places, others)
