"""Feature reuse in the host: which sites a model has, what memory they may take, and one pass with them."""
import logging
from dataclasses import replace

import comfy.model_management as host_memory
import torch

from ...fastercache_core.reuse import ReuseCache
from .attention_calls import AttentionCalls, CallsDiffer
from .families import available, find_family
from .sites import FeatureSwap, control_of_kept_blocks

# Of the memory that the host reports free beyond what it needs to sample, features may take this share.
SHARE = 0.5
# Attention whose input and output another node may change in step, as token merging does.
PATCHED = {"self": "attn1", "cross": "attn2"}


class Features:
    """Feature reuse during one run of one model (ModelPatcher) under `settings` (ReuseSettings).

    notes: what a user should know of it. plan: sites that have room in memory, of how many, and bytes.
    """

    def __init__(self, settings, model, percent_to_sigma):
        network = model.model.diffusion_model
        self.family = find_family(getattr(network, "_orig_mod", network))
        self.settings, self.percent_to_sigma = settings, percent_to_sigma
        self.device = torch.device(settings.storage.device or model.load_device)
        self.notes = [] if self.family.known else [unknown(self.family)]
        self.depths = [(name, kinds) for name, kinds in settings.depths if self.family.kinds() >= set(kinds)]
        self.passed_over, self.now = {}, None
        if self.depths:
            self._use(*self.depths.pop(0))
        else:
            intervals, replaced = available(self.family, settings.intervals)
            self.notes += [instead(self.family, kind, other) for kind, other in replaced.items()]
            self._use(None, intervals)

    def begin(self, evaluation, wanted=None):
        """A new evaluation starts. wanted: whether features shall be reused, None to go by the intervals."""
        if self.depths and self.cache.memory.recorded:
            self._settle_depth()
        self._update_plan()
        self.now = evaluation, wanted
        self.cache.begin(*self.now)

    def run(self, executor, args, kwargs, branches, kept, alike):
        """One pass of the network: its output, and the set of kinds that came from the cache.

        args: x, t, c_concat, c_crossattn, control, transformer_options. branches: identities of the
        chunks of the batch; kept: the same, None where features are not stored. alike: False where
        these branches are not computed as they were when their features were stored.
        """
        model = executor.class_obj
        network = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
        if self.swap is None:
            self._start(model, network, args)
        self._forget_changed(branches, conditions_of(model, args))
        reused = self._reusable(branches, args[5]) if alike else set()
        recorded = self.cache.worth_storing() - reused if any(kept) else set()
        self.cache.begin_record(kept, recorded)
        prepared = (*args[:4], control_for(args[4], network, reused), self.swap.options(args[5], reused), *args[6:])
        try:
            with self.swap.running(branches, kept, reused, recorded):
                return executor(*prepared, **kwargs), reused
        except CallsDiffer:
            self._start_anew(branches)
        except torch.cuda.OutOfMemoryError:
            if not self.tensors():
                raise
            self._give_up()
        return executor(*args, **kwargs), set()

    def tensors(self):
        """Every tensor held."""
        return self.cache.tensors()

    def close(self):
        """End the run: drop every tensor, return the plan as plain data for the report."""
        self._update_plan()
        self.notes += [] if self.plan["sites"] else [self._why_nothing()]
        self.notes += [self._why_depth()] if self.depth else []
        self.cache.reset()
        self.swap = None
        if self.device.type != "cpu":
            host_memory.soft_empty_cache()
        return {**self.plan, "device": str(self.device), "dtype": self.settings.storage.dtype,
                "kinds": list(self.cache.schedules), **({"depth": self.depth} if self.depth else {})}

    def _use(self, depth, intervals):
        """Begin to cache at `intervals` ({kind: Interval}); depth: their name, None where it was not chosen here."""
        self.depth = depth
        self.cache = ReuseCache(replace(self.settings, intervals=intervals), self.percent_to_sigma)
        self.swap, self.conditions = None, {}
        self.plan = {"sites": 0, "of": 0, "bytes": 0}

    def _settle_depth(self):
        """Stay with the depth whose features were recorded, if all of them have room."""
        if self.cache.memory.has_room():
            self.depths = []
        else:
            self._pass_over("not enough memory" if self.cache.memory.promised else "not in this model")

    def _pass_over(self, reason):
        """Try the depth that saves most of those left."""
        self.passed_over[self.depth] = reason
        self.cache.reset()
        self._use(*self.depths.pop(0))

    def _start(self, model, network, args):
        """The first pass: the host has loaded the model, so what is free now is really free."""
        while self.depths and any(is_patched(kind, args[5].get("patches", {})) for kind in self.cache.schedules):
            self._pass_over("patched by another node")
            self.cache.begin(*self.now)
        wrappers = args[5].get("wrappers", {}).get("apply_model", {})
        compiled = "torch.compile" in wrappers
        self.swap = (FeatureSwap(network, self.family, self.cache, self.cache.schedules, compiled)
                     if self.family.known else AttentionCalls(self.cache, compiled))
        if self.cache.memory.budget is None:
            needed = model.memory_required(list(args[0].shape)) if self.device == args[0].device else 0
            self.cache.memory.budget = free_bytes(self.device, needed)

    def _reusable(self, branches, options):
        reused = self.cache.reusable(branches)
        for kind in [kind for kind in reused if is_patched(kind, options.get("patches", {}))]:
            reused.discard(kind)
            self._note(f"a patch of another node works on the inside of {kind} features: they are computed every time")
        return reused

    def _forget_changed(self, branches, conditions):
        """Forget what was stored under other conditions: the network was another one then."""
        for branch in branches:
            if not same(self.conditions.get(branch, conditions), conditions):
                self.cache.forget(branch)
            self.conditions[branch] = conditions

    def _start_anew(self, branches):
        for branch in branches:
            self.cache.forget(branch)
        self._note("a pass did not call attention as the one before it did: it was computed again in full")

    def _give_up(self):
        """Leave all memory to the host for the rest of the run."""
        self.cache.reset()
        self.cache.memory.budget, self.depths = 0, []
        host_memory.soft_empty_cache()
        self._note("memory ran out: cached features were dropped and none are kept for the rest of this run; "
                   "give memory_gb, or keep them on the cpu")

    def _note(self, note):
        if note not in self.notes:
            self.notes.append(note)

    def _update_plan(self):
        """Keep the largest plan of the run, and tell it when it is first known."""
        plan = self.cache.memory.plan()
        if plan["sites"] and not self.plan["sites"]:
            logging.info("FasterCache: %s", self._plan_line(plan))
        self.plan = max(self.plan, plan, key=lambda p: (p["bytes"], p["of"]))

    def _plan_line(self, plan):
        return (f"features of {plan['sites']} of {plan['of']} sites ({', '.join(self.cache.schedules)}) are "
                f"cached: {plan['bytes'] / 1e6:.1f} MB of {self.cache.memory.budget / 1e6:.0f} MB on {self.device}, "
                f"{self.settings.storage.dtype}" + (f"; {self._why_depth()}" if self.depth else ""))

    def _why_depth(self):
        """The sentence on a depth that was chosen here."""
        others = "".join(f"; {depth}: {reason}" for depth, reason in self.passed_over.items())
        return f"automatic depth: {self.depth} saves most of what {self.family.name} has and memory holds{others}"

    def _why_nothing(self):
        kinds = " or ".join(self.cache.schedules)
        if self.plan["of"]:
            return (f"no {kinds} feature fits into {self.cache.memory.budget / 1e6:.1f} MB: nothing is reused; raise "
                    "memory_gb, choose a smaller memory_dtype, or keep features on the cpu")
        return f"no {kinds} feature was found in this run: nothing is reused"


def conditions_of(model, args):
    """What must be as it was for stored features to be valid, [(name, object)].

    Patches of other nodes, the blocks that a ControlNet adds to, and the strengths of the hooks
    (LoRA of a conditioning) that act now. args: as of APPLY_MODEL.
    """
    control, options = args[4] or {}, args[5]
    hooks = getattr(getattr(model, "current_patcher", None), "current_hooks", None)
    return [*(item for name in ("patches", "patches_replace") for item in _leaves(name, options.get(name, {}))),
            *(((name, i), value is None) for name, values in control.items() for i, value in enumerate(values)),
            *((("hook", i), hook.strength) for i, hook in enumerate(hooks.hooks if hooks else ()))]


def same(before, now):
    """True when two results of `conditions_of` are: objects are told by identity, numbers by value."""
    return len(before) == len(now) and all(
        a == b and (x is y or (isinstance(x, (bool, float)) and x == y)) for (a, x), (b, y) in zip(before, now))


def is_patched(kind, patches):
    """True where another node's patches need what `kind` would leave out.

    Patches between the blocks of a UNet look at what lies inside it; a pair around an attention hands
    something across it, such as which tokens were merged.
    """
    if kind == "deep":
        return any(functions and "block_patch" in name for name, functions in patches.items())
    name = PATCHED.get(kind)
    return bool(patches.get(f"{name}_patch") and patches.get(f"{name}_output_patch"))


def control_for(control, network, reused):
    """ControlNet residuals of a pass in which the kinds `reused` come from the cache, None for none.

    The host takes them out of their lists: the caller's own stay whole.
    """
    if control is not None:
        control = {name: list(values) for name, values in control.items()}
    return control_of_kept_blocks(control, network) if "deep" in reused else control


def free_bytes(device, needed):
    """Bytes that features may take on a device, of what the host reports free; needed: bytes to sample."""
    free = host_memory.get_free_memory(device) - max(needed, host_memory.minimum_inference_memory())
    return int(max(free, 0) * SHARE)


def instead(family, kind, other):
    """The sentence for a kind of site that a family does not have."""
    found = f"{other} is reused instead" if other else "it always runs"
    return f"{family.name} has no {kind} features that can be taken alone: {found}"


def unknown(family):
    """The sentence for a model of no family."""
    return (f"{family.name} is no model that feature reuse knows: only its attention is reused, where the host "
            "can be asked to leave it out")


def _leaves(name, value):
    """(path, object) of everything in nested dicts and lists."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves((name, key), value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in _leaves((name, i), item)]
    return [(name, value)]
