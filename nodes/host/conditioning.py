"""Which conditioning is which: identities that survive batching, and signs that one changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Part(NamedTuple):
    """A part of a latent that is denoised by itself: its indices in one dimension."""

    indices: tuple[int, ...]
    dim: int

    def of(self, full: torch.Tensor) -> torch.Tensor | None:
        """The part of a whole latent [batch, ...], None where it has no such part."""
        if (
            not self.indices
            or self.dim >= full.ndim
            or not 0 <= min(self.indices) <= max(self.indices) < full.shape[self.dim]
        ):
            return None
        return full.index_select(self.dim, torch.tensor(self.indices, device=full.device))


Window = Part | None  # None: the whole latent
# A conditioning in the host's terms: its uuid, its place in the guider's list, the window, the latent's shape, and how
# often the same came before in one evaluation.
Key = tuple[str, int, Window, tuple[int, ...], int]
Cond = Mapping[str, Any]


def window_of(options: Mapping[str, Any]) -> Window:
    """The context window that runs now, as the host or AnimateDiff-Evolved tell it; None where there is none.

    options: the transformer's.
    """
    window, params = options.get("context_window"), options.get("ad_params")
    indices, dim = getattr(window, "index_list", None), getattr(window, "dim", None)
    if indices is None and isinstance(params, Mapping):
        indices, dim = params.get("sub_idxs"), 0
    try:
        return None if indices is None or dim is None else Part(tuple(map(int, indices)), int(dim))
    except (TypeError, ValueError):
        return None


def branch_keys(options: Mapping[str, Any], shape: torch.Size, seen: Counter[Any]) -> list[Key]:
    """One identity per chunk of the batch that the host runs now.

    The host's uuid alone collides (area conditionings copy the opposite one's, windows share theirs, tiles are the same
    branch again), so the place in the guider's list, the window, the latent shape and the occurrence within this
    evaluation are added. seen: of this evaluation.
    """
    window, keys = window_of(options), []
    for uuid, index in zip(options["uuids"], options["cond_or_uncond"], strict=True):
        key = (str(uuid), index, window, tuple(shape[1:]))
        keys.append((*key, seen[key]))
        seen[key] += 1
    return keys


def keys_ahead(conds: Sequence[Any], window: Window, shape: torch.Size, sigma: float) -> list[Key]:
    """The identities that `branch_keys` will give to the conditionings that run at `sigma`, but to those of areas: the
    latent has another shape there."""
    return [
        (str(cond.get("uuid")), index, window, tuple(shape[1:]), 0)
        for index, branch in enumerate(conds)
        for cond in branch or ()
        if is_active(cond, sigma) and cond.get("area") is None
    ]


def reference_branch(conds: Sequence[Any], positive: Sequence[str]) -> int | None:
    """Index in `conds` of the branch with the uuids `positive`, None when it is not among them.

    Guiders order their lists differently and windows copy them, but the uuids stay.
    """
    return next((i for i, branch in enumerate(conds) if branch and uuids(branch) == positive), None)


def branch_name(index: int, reference: int, count: int) -> str:
    """What a branch is called in reports."""
    if index == reference:
        return "cond"
    return "uncond" if count == 2 else f"uncond {index}"


def fingerprint(conds: Sequence[Any], sigma: float, x: torch.Tensor) -> Any:
    """What must stay the same for cached values to be valid: latent and active conditionings."""
    active = tuple(tuple(_identity(c, sigma) for c in branch or () if is_active(c, sigma)) for branch in conds)
    return tuple(x.shape), x.dtype, x.device, active


def is_active(cond: Cond, sigma: float) -> bool:
    """True when `sigma` lies in the conditioning's own timestep range, by the host's test."""
    return _is_between(sigma, cond.get("timestep_start", float("inf")), cond.get("timestep_end", 0.0))


def active_branches(conds: Sequence[Any], sigma: float) -> list[int]:
    """Indices of the branches of which the host will run at least one conditioning at `sigma`."""
    return [i for i, branch in enumerate(conds) if any(is_active(cond, sigma) for cond in branch or ())]


def rows_asked(conds: Sequence[Any], sigma: float, batch: int) -> int:
    """How many rows the host runs at least for `conds` at `sigma`; those that only fill what others leave may not."""
    return batch * sum(is_active(c, sigma) and "default" not in c for branch in conds for c in branch or ())


def step_hooks(model: Any, conds: Sequence[Any], sigma: float, timestep: torch.Tensor, options: Any) -> None:
    """Count this evaluation for the keyframes of every active conditioning's hooks.

    The host counts it for branches that run, once per sigma. A keyframe that lasts for a number of steps must not last
    longer because its branch is estimated. sigma: the float of `timestep`; options: the model's.
    """
    for cond in (c for branch in conds for c in branch or () if c.get("hooks") is not None):
        if is_active(cond, sigma):
            model.current_patcher.prepare_hook_patches_current_keyframe(timestep, cond["hooks"], options)


def _is_between(sigma: float, start: Any, end: Any) -> bool:
    # The host compares tensors of sigmas, in 32 bits, with floats of 64 bits rounded to them.
    return float(np.float32(float(end))) <= sigma <= float(np.float32(float(start)))


def uuids(branch: Any) -> list[str]:
    """The host's uuids of a branch's conditionings."""
    return [str(cond.get("uuid")) for cond in branch or ()]


def _identity(cond: Cond, sigma: float) -> tuple[Any, ...]:
    hooks = cond.get("hooks")
    strengths = tuple(hook.strength for hook in hooks.hooks) if hooks is not None else ()
    return str(cond.get("uuid")), tuple(_controls(cond.get("control"), sigma)), strengths


def _controls(control: Any, sigma: float) -> Iterator[bool]:
    while control is not None:
        start, end = getattr(control, "timestep_range", None) or (float("inf"), 0.0)
        yield _is_between(sigma, start, end)
        control = getattr(control, "previous_controlnet", None)
