"""One pass of the network with features from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...fastercache_core import messages
from ...fastercache_core.clock import Evaluation
from ...fastercache_core.features.reuse import ReuseSettings
from .attention_hook import AttentionHook, CallsDiffer
from .conditioning import Key
from .families import DEEP
from .feature_hooks import FeatureHooks, FeatureRequest, control_for, network_lock
from .feature_plan import FeaturePlan, is_patched
from .model_call import ModelCall

OutOfMemory: type[Exception] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


# A part may change by so many times as much as the whole latent, and by no more than its own size: one from elsewhere
# does.
ALIKE = 1.5


class FeaturePass:
    """Feature reuse during one run of one model. notes: what a user should know of it."""

    def __init__(self, settings: ReuseSettings, model: Any, percent_to_sigma: Callable[[float], float]) -> None:
        """model: ModelPatcher."""
        self.plan = FeaturePlan(settings, model, percent_to_sigma)
        self.notes = self.plan.notes
        self._conditions: dict[Key, Conditions] = {}
        self._contents: dict[
            Key, tuple[Tensor, Tensor]
        ] = {}  # what a branch was computed from, and the whole latent then

    def begin(self, evaluation: Evaluation, x: Tensor) -> None:
        """A new evaluation starts at latent `x` [batch, ...]."""
        self._x = x
        self.plan.update()
        self.plan.cache.begin(evaluation)

    def run(self, call: ModelCall, request: FeatureRequest) -> tuple[Tensor, set[str]]:
        """One pass of the network: its output, and the kinds of features that came from the cache."""
        with network_lock(call.network):
            if self.plan.gave_up:
                return call.run(), set()
            try:
                return self._run(call, request)
            except CallsDiffer:
                recover = partial(self._start_anew, request.branches)
            except OutOfMemory:
                recover = partial(self.plan.give_up)
            # Not in the handlers: while these run, what the failed pass computed takes memory.
            recover()
            return call.run(), set()

    def reusable(self, branches: Sequence[Key], options: Mapping[str, Any]) -> set[str]:
        """Kinds of features that `branches` can reuse now; options: the transformer's."""
        reusable = self.plan.cache.reusable(branches) - self.plan.unchecked if branches else set()
        patched = {kind for kind in reusable if is_patched(kind, options.get("patches", {}))}
        for kind in sorted(patched):
            self.plan.note(messages.patched_kind(kind))
        return reusable - patched

    def forget(self) -> None:
        """Forget every branch, so that all are computed next."""
        for branch in self._conditions:
            self.plan.cache.forget(branch)

    @staticmethod
    def deep(kinds: Iterable[str]) -> bool:
        """True when every one of `kinds` leaves out more than half of a pass."""
        return DEEP.issuperset(kinds)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return self.plan.cache.tensors()

    def close(self) -> dict[str, Any]:
        """End the run: drop every tensor, return the plan as plain data for the report: what has room, and where."""
        self._contents.clear()
        return self.plan.close()

    def _run(self, call: ModelCall, request: FeatureRequest) -> tuple[Tensor, set[str]]:
        hooks = self.plan.hooks or self.plan.start(call, request)
        self._forget_changed(request.branches, conditions_of(call))
        if request.tiled:
            self._forget_moved(request.branches, call.x)
        reused = self.reusable(request.branches, call.options) if request.reuse else set()
        recorded = self.plan.cache.to_store() - reused if any(request.kept) else set()
        self.plan.cache.begin_record(request.kept, recorded)
        if request.tiled and recorded:
            parts = call.x.clone().chunk(len(request.branches))
            self._contents |= {b: (part, self._x.clone()) for b, part in zip(request.kept, parts, strict=True) if b}
        if recorded & self.plan.unchecked and isinstance(hooks, FeatureHooks):
            return self._checked(call, hooks, request, recorded), set()
        with self.plan.watching(call):
            return run_under(hooks, call, request, reused, recorded), reused

    def _checked(self, call: ModelCall, hooks: FeatureHooks, request: FeatureRequest, kinds: set[str]) -> Tensor:
        """The output of a pass that stores `kinds`, and is run once more with what was stored: the latent is the same,
        so the output must be."""
        with hooks.remembering():
            output = run_under(hooks, call, request, set(), kinds)
            again = run_under(hooks, call, replace(request, branches=request.kept), kinds, set())
        change = (again - output).float().norm() / (output - call.x).float().norm().clamp_min(1e-9)
        self.plan.checked(kinds, bool(change <= 2 * eps_of(call.model) + 1e-3))
        return output

    def _forget_changed(self, branches: Sequence[Key], conditions: Conditions) -> None:
        """Forget what was stored under other conditions: the network was another one then."""
        for branch in branches:
            if not same(self._conditions.get(branch, conditions), conditions):
                self.plan.cache.forget(branch)
            self._conditions[branch] = conditions

    def _forget_moved(self, branches: Sequence[Key], x: Tensor) -> None:
        """Forget branches whose input changed by far more than the whole latent did: it is of another part now."""
        for branch, part in zip(branches, x.chunk(len(branches)), strict=True):
            before = self._contents.get(branch)
            if before and not _moved_alike((before[0], part), (before[1], self._x)):
                self.plan.cache.forget(branch)
                self.plan.note(messages.TILES_MOVE)

    def _start_anew(self, branches: Iterable[Key]) -> None:
        for branch in branches:
            self.plan.cache.forget(branch)
        self.plan.note(messages.PASS_DIFFERS)


def _moved_alike(part: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> bool:
    """True when a part changed about as much as the whole latent; both as they were and as they are."""
    if part[0].shape != part[1].shape:
        return False
    changes = [(now - before).norm() / before.norm() for before, now in (part, whole)]
    return bool(changes[0] <= (ALIKE * changes[1] + 1e-4).clamp(max=1.0))


def run_under(
    hooks: FeatureHooks | AttentionHook, call: ModelCall, request: FeatureRequest, reused: set[str], recorded: set[str]
) -> Tensor:
    """One pass of the network, with the kinds `reused` from the cache and those of `recorded` stored."""
    control = control_for(call.control, call.network, reused)
    with hooks.running(request, reused, recorded):
        return call.run(control=control, options=hooks.options(call.options, reused))


def eps_of(model: Any) -> float:
    """The relative rounding error of the numbers that a model (the host's BaseModel) computes with."""
    return torch.finfo(model.manual_cast_dtype or model.get_dtype()).eps


Conditions = list[tuple[Any, Any]]  # (name, object)


def conditions_of(call: ModelCall) -> Conditions:
    """What must be as it was for stored features to be valid.

    Patches of other nodes, the blocks that a ControlNet adds to, and the strengths of the hooks (LoRA of a
    conditioning) that act now.
    """
    control, options = call.control or {}, call.options
    hooks = getattr(getattr(call.model, "current_patcher", None), "current_hooks", None)
    return [
        *(leaf for name in ("patches", "patches_replace") for leaf in _leaves(name, options.get(name, {}))),
        *(((name, i), value is None) for name, values in control.items() for i, value in enumerate(values)),
        *((("hook", i), hook.strength) for i, hook in enumerate(hooks.hooks if hooks else ())),
    ]


def same(before: Conditions, now: Conditions) -> bool:
    """True when two results of `conditions_of` are: objects are told by identity, numbers by value."""
    return len(before) == len(now) and all(
        a == b and (x is y or (isinstance(x, (bool, float)) and x == y))
        for (a, x), (b, y) in zip(before, now, strict=True)
    )


def _leaves(name: Any, value: Any) -> Conditions:
    """(path, object) of everything in nested dicts and lists."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves((name, key), value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in _leaves((name, i), item)]
    return [(name, value)]
