"""Feature reuse in the host: which sites a model has, what memory they may take, and one pass with them."""
import logging
from dataclasses import replace

import comfy.model_management as host_memory
import torch

from ...fastercache_core.reuse import ReuseCache
from .families import available, find_family
from .sites import FeatureSwap, control_of_kept_blocks, skip_empty_attention

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
        intervals, replaced = available(self.family, settings.intervals)
        self.notes = [instead(self.family, kind, other) for kind, other in replaced.items()]
        self.cache = ReuseCache(replace(settings, intervals=intervals), percent_to_sigma)
        self.device = torch.device(settings.storage.device or model.load_device)
        self.swap = None
        self.plan = {"sites": 0, "of": 0, "bytes": 0}
        self.conditions = {}

    def begin(self, evaluation, wanted=None):
        """A new evaluation starts. wanted: whether features shall be reused, None to go by the intervals."""
        self._update_plan()
        self.cache.begin(evaluation, wanted)

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
        try:
            with self.swap.running(branches, kept, reused, recorded):
                return executor(*prepared(args, network, reused), **kwargs), reused
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
        if not self.plan["sites"]:
            self.notes.append(self._why_nothing())
        self.cache.reset()
        self.swap = None
        if self.device.type != "cpu":
            host_memory.soft_empty_cache()
        return {**self.plan, "device": str(self.device), "dtype": self.cache.settings.storage.dtype,
                "kinds": list(self.cache.settings.intervals)}

    def _start(self, model, network, args):
        """The first pass: the host has loaded the model, so what is free now is really free."""
        wrappers = args[5].get("wrappers", {}).get("apply_model", {})
        self.swap = FeatureSwap(network, self.family, self.cache, self.cache.schedules, "torch.compile" in wrappers)
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

    def _give_up(self):
        """Leave all memory to the host for the rest of the run."""
        self.cache.reset()
        self.cache.memory.budget = 0
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
                f"{self.cache.settings.storage.dtype}")

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


def prepared(args, network, reused):
    """The arguments of a pass in which the kinds `reused` come from the cache.

    The host takes ControlNet residuals out of their lists: the caller's own stay whole.
    """
    control, options = args[4], args[5]
    if control is not None:
        control = {name: list(values) for name, values in control.items()}
    if "deep" in reused:
        control = control_of_kept_blocks(control, network)
    if "self" in reused:
        options = skip_empty_attention(options)
    return (*args[:4], control, options, *args[6:])


def free_bytes(device, needed):
    """Bytes that features may take on a device, of what the host reports free; needed: bytes to sample."""
    free = host_memory.get_free_memory(device) - max(needed, host_memory.minimum_inference_memory())
    return int(max(free, 0) * SHARE)


def instead(family, kind, other):
    """The sentence for a kind of site that a family does not have."""
    found = f"{other} is reused instead" if other else "it always runs"
    return f"{family.name} has no {kind} features that can be taken alone: {found}"


def _leaves(name, value):
    """(path, object) of everything in nested dicts and lists."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves((name, key), value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in _leaves((name, i), item)]
    return [(name, value)]
