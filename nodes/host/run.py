"""One sampling run: which evaluations are skipped, how they are filled in, what is reported.

Made when the run starts and dropped when it ends, however it ends. Nothing of it outlives the
run but its report.
"""
import time

from ...fastercache_core.clock import Clock
from ...fastercache_core.guidance import GuidanceCache
from ...fastercache_core.jump import JumpCache
from ...fastercache_core.report import EvaluationRecord, RunReport
from ...fastercache_core.reuse import ReuseCache
from ...fastercache_core.schedule import Action

from .attention import AttentionSwap, find_family, skip_empty_attention
from .branches import branch_is_active, branch_keys, fingerprint
from .output_space import OutputSpace
from .refusals import refusals
from .samplers import sampler_name

BRANCH_NAMES = ("cond", "uncond")


class CacheRun:
    """State of one run of one model under `settings` (CacheSettings)."""

    def __init__(self, settings, guider, sampler, sigmas):
        self.report = RunReport(run=describe(settings, guider, sampler, sigmas))
        self.model_sampling = guider.model_patcher.get_model_object("model_sampling")
        self.clock = Clock(sigmas.tolist())
        self.started = self.evaluation_started = time.perf_counter()
        self.evaluation = self.record = self.seen = self.swap = None
        self.calls = self.full_rows = 0
        self._start_methods(settings, refusals(settings, guider, sampler))

    def _start_methods(self, settings, refused):
        for reason in dict.fromkeys(refused.values()):
            self.report.note(reason)
        percent_to_sigma = self.model_sampling.percent_to_sigma

        def start(name, cache):
            method = getattr(settings, name)
            return None if method is None or name in refused else cache(method, percent_to_sigma)

        self.jump = start("jump", JumpCache)
        self.guidance = start("guidance", GuidanceCache)
        self.reuse = start("reuse", ReuseCache)

    def begin(self, sigma):
        """A new evaluation at `sigma` (float) starts."""
        self._close_evaluation()
        self.evaluation = self.clock.tick(sigma)
        self.record = EvaluationRecord(self.evaluation.ordinal, sigma, {})
        self.report.evaluations.append(self.record)
        self.calls = 0
        if self.reuse:
            self.reuse.begin(self.evaluation)

    def first_call(self):
        """True for the pass that guidance itself asks for, False for what other nodes add to it.

        Skip-layer, perturbed and self-attention guidance run the network again within the same
        evaluation, with other blocks or another latent: those passes are left alone.
        """
        self.calls += 1
        return self.calls == 1

    def evaluate(self, run_branches, conds, x, timestep):
        """Denoised outputs of all branches, computed or not.

        run_branches(conds) runs the network for a list of conditionings (None: not run) and
        returns their denoised outputs, tensors like x [batch, ...]. timestep: [batch] sigmas.
        """
        self._forget_if_changed(conds, x)
        active = [branch_is_active(branch, self.evaluation.sigma) for branch in conds]
        space = OutputSpace(self.model_sampling, timestep, x)
        action = self._choose(active)
        self.record.actions.update(
            {_name(i): (Action.FULL if i == 0 and action == Action.ESTIMATE else action).value
             for i, is_active in enumerate(active) if is_active})
        if action == Action.JUMP:
            return self._jump(space, active, x)
        outputs = self._compute(run_branches, conds, active, action, space)
        if self.jump and active[0]:
            self.jump.observe(self.evaluation, space.output(outputs[0]))
        return outputs

    def apply_model(self, executor, args, kwargs):
        """Run the network once for one batch of chunks, with attention outputs from the cache if due.

        args: x, t, c_concat, c_crossattn, control, transformer_options.
        """
        self.record.rows += args[0].shape[0]
        if self.reuse is None or self.calls != 1:
            return executor(*args, **kwargs)
        swap = self._attention(executor.class_obj.diffusion_model)
        branches = branch_keys(args[5], args[0].shape)
        if self.reuse.may_reuse(self.evaluation, branches):
            return self._reuse(swap, branches, executor, args, kwargs)
        # With an unconditional branch that is mostly estimated, its features would go stale.
        kept = [b if b[1] == 0 or self.guidance is None else None for b in branches]
        self.reuse.begin_record(self.evaluation, kept)
        with swap.recording(kept):
            return executor(*args, **kwargs)

    def close(self):
        """End the run: drop every tensor, finish the report."""
        self._close_evaluation()
        self._count_memory()
        self.report.seconds = time.perf_counter() - self.started
        self.jump = self.guidance = self.reuse = self.swap = None

    def _choose(self, active):
        if not active[0] or len(active) > len(BRANCH_NAMES):
            if len(active) > len(BRANCH_NAMES):
                self.report.note("a guider with more than two conditionings is not cached yet")
            return Action.FULL
        guided = len(active) == 2 and active[1]
        if self.jump and self.jump.may_jump(self.evaluation):
            if not guided or (self.guidance and self.guidance.history.ready):
                return Action.JUMP
        if guided and self.guidance and self.guidance.may_estimate(self.evaluation):
            return Action.ESTIMATE
        return Action.FULL

    def _jump(self, space, active, x):
        cond = space.denoised(self.jump.cond(self.evaluation).to(x.dtype))
        return [cond, *self._others(space, cond, active[1:])]

    def _compute(self, run_branches, conds, active, action, space):
        if action == Action.ESTIMATE:
            outputs = run_branches([conds[0]] + [None] * (len(conds) - 1))
            return [outputs[0], *self._others(space, outputs[0], active[1:])]
        outputs = run_branches(conds)
        if self.guidance and active == [True, True]:
            self.guidance.observe(self.evaluation, space.difference(outputs[1], outputs[0]))
        return outputs

    def _others(self, space, cond, active):
        """The remaining branches from `cond`; inactive ones are zeros, as the host leaves them."""
        return [space.add(cond, self.guidance.difference(self.evaluation)) if is_active
                else cond.new_zeros(cond.shape) for is_active in active]

    def _reuse(self, swap, branches, executor, args, kwargs):
        args = (*args[:5], skip_empty_attention(args[5]), *args[6:])
        for branch in branches:
            name = _name(branch[1])
            if self.record.actions.get(name) == Action.FULL.value:
                self.record.actions[name] = Action.REUSE.value
        with swap.reusing(branches):
            return executor(*args, **kwargs)

    def _attention(self, diffusion_model):
        network = getattr(diffusion_model, "_orig_mod", diffusion_model)
        if self.swap is None:
            self.swap = AttentionSwap(network, find_family(network), self.reuse)
        return self.swap

    def _forget_if_changed(self, conds, x):
        seen = fingerprint(conds, self.evaluation.sigma, x)
        if self.seen is not None and seen != self.seen:
            for method in (self.jump, self.guidance, self.reuse):
                if method:
                    method.reset()
        self.seen = seen

    def _close_evaluation(self):
        now = time.perf_counter()
        if self.record is not None:
            self.record.seconds = now - self.evaluation_started
            if set(self.record.actions.values()) <= {Action.FULL.value, Action.REUSE.value}:
                self.full_rows = self.record.rows
            self.record.rows_full = max(self.full_rows, self.record.rows)
            self._count_memory()
        self.record = None
        self.evaluation_started = now

    def _count_memory(self):
        held = {}
        for store in [m for m in (self.jump, self.guidance, self.reuse) if m]:
            for tensor in store.tensors():
                device = str(tensor.device)
                held[device] = held.get(device, 0) + tensor.numel() * tensor.element_size()
        for device, size in held.items():
            self.report.cache_bytes[device] = max(self.report.cache_bytes.get(device, 0), size)


def describe(settings, guider, sampler, sigmas):
    """The `run` part of a report: which model, sampler and sigmas, under which settings."""
    return {"model": type(guider.model_patcher.model).__name__, "settings": settings.label,
            "sampler": sampler_name(sampler), "steps": len(sigmas) - 1,
            "cfg": getattr(guider, "cfg", None), "sigmas": [round(s, 6) for s in sigmas.tolist()],
            "branches": list(getattr(guider, "conds", {}))}


def _name(index):
    return BRANCH_NAMES[index] if index < len(BRANCH_NAMES) else f"branch {index}"
