"""Feature reuse in the host: which sites a model has, what memory they may take, and one pass with them."""
import logging
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management as host_memory
import torch
from comfy.patcher_extension import WrappersMP

from ...fastercache_core.report import features_text
from ...fastercache_core.reuse import ReuseCache
from .attention_calls import AttentionCalls, CallsDiffer
from .families import available, find_family
from .sites import FeatureSwap, control_of_kept_blocks

# Of the memory that the host reports free beyond what it needs to sample, features may take this share.
SHARE = 0.5
# Attention whose input and output another node may change in step, as token merging does.
PATCHED = {"self": "attn1", "temporal": "attn1", "cross": "attn2"}


class Features:
    """Feature reuse during one run of one model (ModelPatcher) under `settings` (ReuseSettings).

    notes: what a user should know of it. plan: sites that have room in memory, of how many, and bytes, and in
    which blocks they lie. It is made before the first pass where that can be foreseen, else as features come.
    """

    def __init__(self, settings, model, percent_to_sigma):
        network = model.model.diffusion_model
        self.family = find_family(getattr(network, "_orig_mod", network))
        self.settings, self.percent_to_sigma, self.compiled = settings, percent_to_sigma, is_compiled(model)
        self.device = torch.device(settings.storage.device or model.load_device)
        self.notes = [] if self.family.known else [unknown(self.family)]
        choices = [(name, *available(self.family, intervals)) for name, intervals in settings.depths]
        self.depths = [(name, found) for name, found, replaced in choices if not replaced]
        self.passed_over, self.now = {}, None
        if self.depths:
            self._use(*self.depths.pop(0))
        else:
            intervals, replaced = available(self.family, settings.intervals)
            self.notes += [instead(self.family, kind, other) for kind, other in replaced.items()]
            self._use(None, intervals)

    def begin(self, evaluation, wanted=None):
        """A new evaluation starts. wanted: whether features shall be reused, None to go by the intervals."""
        if self.cache.memory.recorded and not self.settled:
            self._settle()
        self._update_plan()
        self.now = evaluation, wanted
        self.cache.begin(*self.now)

    def run(self, executor, args, kwargs, branches, kept, alike, ahead=()):
        """One pass of the network: its output, and the set of kinds that came from the cache.

        args: x, t, c_concat, c_crossattn, control, transformer_options. branches: identities of the
        chunks of the batch; kept: the same, None where features are not stored. alike: False where
        these branches are not computed as they were when their features were stored. ahead: branches of this
        evaluation that run in other passes and whose features will be stored.
        """
        model = executor.class_obj
        network = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
        if self.swap is None:
            self._start(model, network, args, kwargs, branches, dict.fromkeys((*filter(None, kept), *ahead)))
        self._forget_changed(branches, conditions_of(model, args))
        reused = self.reusable(branches, args[5]) if alike else set()
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
        """End the run: drop every tensor, return the plan as plain data for the report: what fits, and where."""
        self._update_plan()
        self.notes += [] if self.plan["sites"] else [self._why_nothing()]
        self.notes += [self._why_depth()] if self.depth else []
        self.cache.reset()
        self.swap = None
        if self.device.type != "cpu":
            host_memory.soft_empty_cache()
        return {**self.plan, **({"depth": self.depth} if self.depth else {})}

    def _use(self, depth, intervals):
        """Begin to cache at `intervals` ({kind: Interval}); depth: their name, None where it was not chosen here."""
        self.depth = depth
        self.cache = ReuseCache(replace(self.settings, intervals=intervals), self.percent_to_sigma)
        self.swap, self.conditions = None, {}
        self.settled, self.told, self.plan = False, False, self._plan()

    def _settle(self):
        """Go by what the first evaluation gave: stay with a depth all of whose features have room."""
        self.cache.memory.withdraw()
        reason = self._lacks()
        if self.depths and reason:
            self._pass_over(reason)
        else:
            self._tell()
            self.depths, self.settled, self.plan = [], True, self._plan()

    def _lacks(self):
        """Why the features that came, or were foreseen, are not all cached; None where they are."""
        if self.cache.memory.has_room():
            return None
        return "not enough memory" if self.cache.memory.promised else "not in this model"

    def _pass_over(self, reason):
        """Try the depth that saves most of those left."""
        self.passed_over[self.depth] = reason
        self.cache.reset()
        self._use(*self.depths.pop(0))

    def _start(self, model, network, args, kwargs, branches, ahead):
        """The first pass: the host has loaded the model, so what is free now is really free."""
        patches, rehearsal = args[5].get("patches", {}), self._rehearsal(model, args, kwargs)
        self.cache.memory.budget = budget = self._budget(model, args)
        try:
            while (reason := self._unfit(patches, rehearsal, branches, ahead)) and self.depths:
                self._pass_over(reason)
                self.cache.begin(*self.now)
                self.cache.memory.budget = budget
        finally:
            if rehearsal:
                rehearsal.close()
        self.swap = self._make_swap(network, self.cache, self.compiled)
        self._tell()

    def _unfit(self, patches, rehearsal, branches, ahead):
        """Why the depth that is tried cannot be had as a whole; None where it can, or that is not known yet."""
        foreseen = self._foresee(rehearsal, branches, ahead)
        if any(is_patched(kind, patches) for kind in self.cache.schedules):
            return "patched by another node"
        return self._lacks() if foreseen else None

    def _make_swap(self, network, cache, compiled=False):
        if self.family.known:
            return FeatureSwap(network, self.family, cache, self.cache.schedules, compiled)
        return AttentionCalls(cache, compiled)

    def _budget(self, model, args):
        """Bytes that features may take."""
        if self.settings.storage.budget is not None:
            return self.settings.storage.budget
        needed = model.memory_required(list(args[0].shape)) if self.device == args[0].device else 0
        return free_bytes(self.device, needed)

    def _rehearsal(self, model, args, kwargs):
        """The pass that is about to run, without numbers; None where the model cannot be run so."""
        with unforeseen():
            from .rehearsal import Rehearsal  # builds on inner parts of torch, which another version may lack
            return Rehearsal(model, args, kwargs, self.family.opaque)

    def _foresee(self, rehearsal, branches, ahead):
        """Promise room to the branches `ahead` for what a pass of `branches` would store; True if that was seen."""
        kinds = self.cache.worth_storing()
        if rehearsal is None or not kinds:
            return False
        with unforeseen():
            swap = self._make_swap(rehearsal.network, Promises(self.cache, ahead))
            with swap.running(branches, branches, set(), kinds):
                rehearsal.run(swap.options(rehearsal.options, set()))
            return True
        self.cache.memory.promised.clear()
        return False

    def reusable(self, branches, options):
        """Kinds of features that `branches` can reuse now; options: the transformer's."""
        reused = self.cache.reusable(branches) if branches else set()
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
        self.cache.memory.budget, self.depths, self.settled = 0, [], True
        host_memory.soft_empty_cache()
        self._note("memory ran out: cached features were dropped and none are kept for the rest of this run; "
                   "give memory_gb, or keep them on the cpu")

    def _note(self, note):
        if note not in self.notes:
            self.notes.append(note)

    def _update_plan(self):
        """Keep the largest plan of the run."""
        now = self.cache.memory.plan()
        if (now["bytes"], now["of"]) > (self.plan["bytes"], self.plan["of"]):
            self.plan = self._plan()

    def _tell(self):
        """Tell the plan when it is first known."""
        plan = self._plan()
        if plan["sites"] and not self.told:
            self.told = True
            why = f"; {self._why_depth()}" if self.depth else ""
            logging.info("FasterCache: features of %s%s", features_text(plan), why)

    def _plan(self):
        """What has room now and where, as plain data."""
        memory = self.cache.memory
        return {**memory.plan(), "budget": memory.budget, "device": str(self.device),
                "dtype": self.settings.storage.dtype, "kinds": list(self.cache.schedules),
                "blocks": self.swap.where(memory.sites()) if self.swap else {}}

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


class Promises:
    """Takes the place of a ReuseCache in a pass without numbers: promises room to what would be stored.

    ahead: the branches that it is promised to.
    """

    def __init__(self, cache, ahead):
        self.cache, self.ahead = cache, ahead

    def store(self, site, branches, feature, axis=0):
        """Promise room to every branch for a slice of a `feature` of as many `branches`."""
        self.cache.promise(site, self.ahead, feature, len(branches), axis)


def is_compiled(model):
    """True when torch.compile is at work in a MODEL (ModelPatcher), by the host's node or as another node's patch."""
    wrapped = model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get("torch.compile")
    return bool(wrapped) or any(hasattr(patch, "_orig_mod") for patch in model.object_patches.values())


@contextmanager
def unforeseen():
    """Whatever goes wrong inside, the run goes on without it; but for the user's wish to end it."""
    try:
        yield
    except host_memory.InterruptProcessingException:
        raise
    except Exception as error:  # a pass without numbers is a courtesy: any model may have its reasons
        logging.debug("FasterCache: features could not be foreseen: %s", error)


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
