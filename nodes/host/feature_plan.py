"""Which features are cached in one run, and how much room they have: decided before the first pass where a dry run can
show what comes, else as features come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management as host_memory
import torch

from ...fastercache_core import messages
from ...fastercache_core.clock import Evaluation, Interval
from ...fastercache_core.features.reuse import ReuseCache, ReuseSettings
from ...fastercache_core.report import features_text
from .attention_hook import AttentionHook
from .compatibility import is_compiled
from .compiler import abandon_pass
from .families import SPANS, Stack, available, find_family
from .feature_hooks import FeatureHooks, FeatureRequest, Promises
from .model_call import ModelCall, uncompiled
from .room import free_bytes, pinned_bytes
from .structure import stacks_of, watching

if TYPE_CHECKING:
    from .dry_run import DryRun

Hooks = FeatureHooks | AttentionHook
# Attention whose input and output another node may change in step, as token merging does.
PATCHED = {"self": "attn1", "temporal": "attn1", "cross": "attn2"}


class FeaturePlan:
    """The cache of one run of one model, and the hooks that fill it.

    family: of the model; notes: sentences for the user; cache: for the kinds of features that are tried, or chosen;
    hooks: None before its first pass; unchecked: kinds in blocks that were found by structure and not yet checked;
    gave_up: memory ran out, no features are cached any more.
    """

    def __init__(self, settings: ReuseSettings, model: Any, percent_to_sigma: Callable[[float], float]) -> None:
        """model: ModelPatcher."""
        self.family = find_family(uncompiled(model.model.diffusion_model))
        self.settings, self.percent_to_sigma, self.compiled = settings, percent_to_sigma, is_compiled(model)
        self.device = torch.device(settings.storage.device or model.load_device)
        self.notes: list[str] = []
        self.gave_up = False
        self.hooks: Hooks | None = None
        self.unchecked: set[str] = set()
        self._seen, self._other_output = self.family.known, False  # whether the blocks were looked for, and fooled us
        self._depths: list[tuple[str, Mapping[str, Interval]]] = []
        self._passed_over: dict[str, str] = {}
        self._replaced: Mapping[str, str | None] = {}
        if self.family.known:
            self._choose()
        else:
            self._use(None, settings.intervals)  # until a pass has shown its blocks

    def note(self, sentence: str) -> None:
        """Tell the user, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def update(self) -> None:
        """An evaluation begins: go by what the ones before gave."""
        if not self._settled and self.cache.memory.last_recorded():
            self._settle()
        self._remember()

    def start(self, call: ModelCall, request: FeatureRequest) -> Hooks:
        """Make the hooks before the first pass: the host has loaded the model, so what is free now is really free."""
        dry_run, budget = self._dry_run(call), self._budget(call)
        try:
            if not self._seen:
                self._look(dry_run, call)
            while True:
                self.cache.memory.offer(*budget)
                reason = self._unfit(call, dry_run, request)
                if not (reason and self._depths):
                    break
                self._pass_over(reason)
        finally:
            if dry_run:
                dry_run.close()
        self.hooks = hooks = self._make_hooks(call.network, self.cache, self.compiled)
        self._tell()
        return hooks

    @contextmanager
    def watching(self, call: ModelCall) -> Iterator[None]:
        """While open, a pass runs, which shows what its blocks do where no dry run could."""
        if self._seen:
            yield
            return
        with watching(call.network, call.x.shape[0]) as lists:
            yield
        self._seen, stacks = True, stacks_of(lists)
        if stacks:
            self._found(stacks)

    def checked(self, kinds: Collection[str], as_computed: bool) -> None:
        """A pass with `kinds` from the cache was run for the latent that they come from.

        as_computed: it gave what the pass did that they were stored in. Otherwise only attention is left to be reused.
        """
        self.unchecked -= set(kinds)
        if not as_computed:
            self._other_output = True
            self.cache.reset()
            self._found(())

    def give_up(self) -> None:
        """Leave all memory to the host for the rest of the run."""
        self.note(messages.OUT_OF_MEMORY if self.cache.tensors() else messages.OUT_OF_MEMORY_AT_ONCE)
        self.gave_up = True
        self.cache.reset()
        abandon_pass()
        host_memory.soft_empty_cache()

    def close(self) -> dict[str, Any]:
        """Drop every tensor; return the largest plan of the run for the report: what had room, and where."""
        self._remember()
        cached = self._largest["sites"] > 0
        self.notes[:0] = [messages.instead(self.family.name, kind, other) for kind, other in self._replaced.items()]
        if self._seen and not self.family.known:
            self.notes.insert(0, self._why_unknown(cached))
        if not (cached or self.gave_up):
            self.notes.append(self._why_nothing())
        if self._depth and cached:
            self.notes.append(self._why_depth())
        self.cache.reset()
        self.hooks = None
        if self.device.type != "cpu":
            host_memory.soft_empty_cache()
        return {**self._largest, **({"depth": self._depth} if self._depth else {})}

    def _look(self, dry_run: DryRun | None, call: ModelCall) -> None:
        """See in a dry run what the blocks do; where there is none, the first pass shows it, if it is not compiled."""
        stacks: tuple[Stack, ...] = ()
        with optional():
            if dry_run:
                with watching(dry_run.network, call.x.shape[0]) as lists:
                    dry_run.run(dry_run.options)
                stacks, self._seen = stacks_of(lists), True
        self._seen |= self.compiled
        self._found(stacks)

    def _found(self, stacks: tuple[Stack, ...]) -> None:
        """The lists of blocks of a model of no family are known now."""
        self.family = replace(self.family, stacks=stacks)
        self._choose()

    def _choose(self) -> None:
        """Take the depths that the family has, the one first that saves most."""
        evaluation = None if self.family.known else self.cache.evaluation
        choices = [(name, *available(self.family, intervals)) for name, intervals in self.settings.depths]
        self._depths = [(name, intervals) for name, intervals, replaced in choices if not replaced]
        if self._depths:
            self._use(*self._depths.pop(0), evaluation)
        else:
            intervals, self._replaced = available(self.family, self.settings.intervals)
            self._use(None, intervals, evaluation)

    def _use(self, depth: str | None, intervals: Mapping[str, Interval], evaluation: Evaluation | None = None) -> None:
        """Cache at `intervals`; depth: their name, None where it was not chosen here."""
        self._depth = depth
        self.cache = ReuseCache(replace(self.settings, intervals=intervals), self.percent_to_sigma)
        if evaluation:
            self.cache.begin(evaluation)
        self.hooks = None
        self.unchecked = set() if self.family.known else set(intervals) & set(SPANS)
        self._settled, self._told, self._largest = False, False, self._plan()

    def _settle(self) -> None:
        """Go by what the first evaluation gave: stay with a depth all of whose features have room."""
        self.cache.memory.withdraw()
        reason = self._lack()
        if self._depths and reason:
            self._pass_over(reason)
        else:
            self._tell()
            self._depths, self._settled, self._largest = [], True, self._plan()

    def _lack(self) -> str | None:
        """Why the features that came, or are expected, are not all cached; None where they are."""
        memory = self.cache.memory
        if memory.has_room():
            return None
        return messages.NO_MEMORY if memory.plan()["of"] else messages.NOT_IN_MODEL

    def _pass_over(self, reason: str) -> None:
        """Try the depth that saves most of those left."""
        assert self._depth
        self._passed_over[self._depth] = reason
        evaluation = self.cache.evaluation
        self.cache.reset()
        self._use(*self._depths.pop(0), evaluation)

    def _unfit(self, call: ModelCall, dry_run: DryRun | None, request: FeatureRequest) -> str | None:
        """Why the depth that is tried cannot be cached as a whole; None where it can, or that is not known yet."""
        seen = dry_run is not None and self._promise(dry_run, request)
        if any(is_patched(kind, call.options.get("patches", {})) for kind in self.cache.kinds):
            return messages.PATCHED
        return self._lack() if seen else None

    def _make_hooks(self, network: Any, cache: ReuseCache | Promises, compiled: bool = False) -> Hooks:
        if self.family.known or set(self.cache.kinds) & set(SPANS):
            return FeatureHooks(network, self.family, cache, self.cache.kinds, compiled)
        return AttentionHook(cache, network, compiled)

    def _budget(self, call: ModelCall) -> tuple[int, int]:
        """Bytes that features may take, and how much main memory may be page-locked for them."""
        if self.settings.storage.budget is not None:
            return self.settings.storage.budget, pinned_bytes()
        needed = call.model.memory_required(list(call.x.shape)) if self.device == call.x.device else 0
        return free_bytes(call.model.current_patcher, self.device, needed), pinned_bytes()

    def _dry_run(self, call: ModelCall) -> DryRun | None:
        """The pass that is about to run, without values; None where the model cannot be run so."""
        with optional():
            from .dry_run import DryRun  # builds on inner parts of torch, which another version may lack

            return DryRun(call, self.family.opaque)
        return None

    def _promise(self, dry_run: DryRun, request: FeatureRequest) -> bool:
        """Promise room for what a pass would store of all branches of its evaluation; True if that was seen."""
        kinds = self.cache.to_store()
        if not kinds:
            return False
        ahead = dict.fromkeys(branch for branch in (*request.kept, *request.ahead) if branch)
        with optional():
            hooks = self._make_hooks(dry_run.network, Promises(self.cache, list(ahead)))
            with hooks.running(request, (), kinds):
                dry_run.run(hooks.options(dry_run.options, ()))
            return True
        self.cache.memory.withdraw()
        return False

    def _remember(self) -> None:
        """Remember the largest plan of the run."""
        now = self.cache.memory.plan()
        if (now["bytes"], now["of"]) > (self._largest["bytes"], self._largest["of"]):
            self._largest = self._plan()

    def _tell(self) -> None:
        """Log the plan when it is first known."""
        plan = self._plan()
        if plan["sites"] and not self._told:
            self._told = True
            depth = self._why_depth() if self._depth else None
            logging.info(messages.features_fit(features_text(plan), depth))

    def _plan(self) -> dict[str, Any]:
        """What has room now and where, as plain data."""
        memory = self.cache.memory
        return {
            **memory.plan(),
            "budget": memory.budget,
            "device": str(self.device),
            "dtype": self.settings.storage.dtype,
            "kinds": self.cache.kinds,
            "blocks": self.hooks.where(memory.sites()) if self.hooks else {},
        }

    def _why_depth(self) -> str:
        assert self._depth
        return messages.automatic_depth(self._depth, self.family.name, self._passed_over)

    def _why_unknown(self, cached: bool) -> str:
        """What is reused of a model of no family. cached: some of it had room."""
        lists = [stack.path for stack in self.family.stacks]
        if cached and set(self.cache.kinds) & set(SPANS):
            return messages.found_blocks(self.family.name, lists)
        return messages.unknown_family(self.family.name, lists, self._other_output, cached)

    def _why_nothing(self) -> str:
        budget = self.cache.memory.budget or 0
        kinds, came = self.cache.kinds, self._largest["of"]
        return messages.no_room(kinds, budget / 1e6) if came else messages.no_feature(kinds)


@contextmanager
def optional() -> Iterator[None]:
    """Whatever goes wrong inside, the run goes on without it; but for the user's wish to end it."""
    try:
        yield
    except host_memory.InterruptProcessingException:
        raise
    except Exception as error:  # any model may have its reasons not to run without values
        logging.debug("FasterCache: no dry run: %s", error)


def is_patched(kind: str, patches: Mapping[str, Any]) -> bool:
    """True where another node's patches need what `kind` would leave out.

    Patches between the blocks of a UNet look at what lies inside it; a pair around an attention hands something across
    it, such as which tokens were merged.
    """
    if kind == "deep":
        return any(functions and "block_patch" in name for name, functions in patches.items())
    name = PATCHED.get(kind)
    return bool(patches.get(f"{name}_patch") and patches.get(f"{name}_output_patch"))
