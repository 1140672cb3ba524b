"""What every kind of input may be. The host checks a part of it, see `schema.checked`."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..fastercache_core.calibration.policy import Policy

CachePolicy = io.Custom("CACHE_POLICY")
Holds = Callable[[Any, Any], bool]  # (input, value) -> the value is one of those that the input takes


def is_between(entry: Any, value: Any) -> bool:
    """True for a number within the bounds of an input."""
    return not isinstance(value, bool) and entry.min <= value <= entry.max


def is_latent(value: Any) -> bool:
    """True for a LATENT that is not empty."""
    samples = value.get("samples") if isinstance(value, dict) else None
    return 0 not in getattr(samples, "shape", (0,))


def is_image(value: Any) -> bool:
    """True for an IMAGE [batch, height, width, channels] that is not empty."""
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.numel() > 0


def is_conditioning(value: Any) -> bool:
    """True for a CONDITIONING, which may have no entry."""
    return isinstance(value, list | tuple) and all(
        isinstance(entry, list | tuple) and len(entry) == 2 for entry in value
    )


# fmt: off
KINDS: list[tuple[type, Holds, Callable[[Any], str]]] = [
    (io.Combo.Input, lambda entry, value: isinstance(value, str) and value in entry.options,
     lambda entry: f"one of: {', '.join(entry.options)}"),
    (io.Int.Input, lambda entry, value: isinstance(value, Integral) and is_between(entry, value),
     lambda entry: f"a whole number from {entry.min} to {entry.max}"),
    (io.Float.Input, lambda entry, value: isinstance(value, Real) and math.isfinite(value) and is_between(entry, value),
     lambda entry: f"a number from {entry.min:g} to {entry.max:g}"),
    (io.Boolean.Input, lambda entry, value: isinstance(value, bool), lambda entry: "true or false"),
    (io.String.Input, lambda entry, value: isinstance(value, str), lambda entry: "a text"),
    (io.Model.Input, lambda entry, value: isinstance(value, ModelPatcher), lambda entry: "a MODEL"),
    (io.Conditioning.Input, lambda entry, value: is_conditioning(value), lambda entry: "a CONDITIONING"),
    (io.Latent.Input, lambda entry, value: is_latent(value), lambda entry: "a LATENT with something in it"),
    (io.MultiType.Input, lambda entry, value: is_image(value) or is_latent(value),
     lambda entry: "an IMAGE or a LATENT with something in it"),
    (CachePolicy.Input, lambda entry, value: isinstance(value, Policy) or (entry.optional and value is None),
     lambda entry: "a policy of FasterCache"),
]
# fmt: on


def lacks(entry: io.Input, value: Any) -> str | None:
    """What `value` of the input `entry` should have been, None where it is that."""
    return next(
        (says(entry) for kind, holds, says in KINDS if isinstance(entry, kind) and not holds(entry, value)), None
    )
