"""The branches of one latent region: which of them run, and how the others are filled in.

A run has one scope, or one per context window of a long video.
"""
from ...fastercache_core.gate import Gate
from ...fastercache_core.guidance import GuidanceCache
from ...fastercache_core.jump import JumpCache
from ...fastercache_core.schedule import Action
from .branches import branch_is_active, fingerprint


class Scope:
    """Outputs and differences of one region, kept across the evaluations of a run."""

    def __init__(self, settings, percent_to_sigma, guidance_scale):
        """guidance_scale: the guider's cfg, by which errors of differences are multiplied."""
        self.settings = settings
        self.guidance_scale = guidance_scale
        self.percent_to_sigma = percent_to_sigma
        self.jump = JumpCache(settings.jump, percent_to_sigma) if settings.jump else None
        self.differences = {}
        self.gates = {Action.JUMP: Gate(settings.gate), Action.ESTIMATE: Gate(settings.gate)}
        self.seen = None
        self.used_at = -1

    def evaluate(self, evaluation, run_branches, conds, reference, x, space):
        """Denoised outputs of all branches and the action of each, dict index -> Action.

        run_branches(conds) runs the network for a list of conditionings (None: not run).
        reference: index of the branch that the others are estimated from. x: the latent
        [batch, ...]. space: the OutputSpace of this evaluation.
        """
        self.used_at = evaluation.ordinal
        self._forget_if_changed(evaluation, conds, x)
        active = [i for i, branch in enumerate(conds) if branch_is_active(branch, evaluation.sigma)]
        others = [i for i in active if i != reference]
        action = self._choose(evaluation, reference in active, others)
        if action == Action.FULL:
            outputs = run_branches(conds)
            self._observe(evaluation, outputs, reference, active, space)
        else:
            outputs = self._fill(action, evaluation, run_branches, conds, reference, others, x, space)
        actions = dict.fromkeys(active, action)
        if action == Action.ESTIMATE:
            actions[reference] = Action.FULL
        return outputs, actions

    def reset(self):
        """Forget everything, so that the next evaluation is full."""
        for method in self._methods():
            method.reset()

    def tensors(self):
        """Every tensor held."""
        return [t for method in self._methods() for t in method.tensors()]

    def _choose(self, evaluation, has_reference, others):
        if not has_reference:
            return Action.FULL
        known = [self.differences.get(i) for i in others]
        if self.jump and self.jump.may_jump(evaluation) and all(d and d.history.ready for d in known):
            if self.gates[Action.JUMP].allows(m.effect(evaluation) for m in (self.jump, *known)):
                return Action.JUMP
        if others and all(d and d.may_estimate(evaluation) for d in known):
            # An error may be as large as the share of the work that it saves.
            share = len(others) / (len(others) + 1)
            if self.gates[Action.ESTIMATE].allows(d.effect(evaluation) / share for d in known):
                return Action.ESTIMATE
        return Action.FULL

    def _fill(self, action, evaluation, run_branches, conds, reference, others, x, space):
        if action == Action.JUMP:
            cond = space.denoised(self.jump.cond(evaluation).to(x.dtype))
        else:
            cond = run_branches([c if i == reference else None for i, c in enumerate(conds)])[reference]
            self._observe_reference(evaluation, cond, space)
        outputs = [cond.new_zeros(cond.shape) if i not in (reference, *others) else cond
                   for i in range(len(conds))]  # the host leaves inactive branches at zero
        for i in others:
            outputs[i] = self.differences[i].estimate(evaluation, cond, space.scale)
        return outputs

    def _observe(self, evaluation, outputs, reference, active, space):
        if reference not in active:
            return
        cond = outputs[reference]
        self._observe_reference(evaluation, cond, space)
        unit = space.unit(cond) * abs(self.guidance_scale - 1) if self.settings.gate else None
        for i in active if self.settings.guidance else ():
            if i != reference:
                self._difference(i).observe(evaluation, space.difference(outputs[i], cond), unit)

    def _observe_reference(self, evaluation, cond, space):
        if self.jump:
            unit = space.unit(cond) if self.settings.gate else None
            self.jump.observe(evaluation, space.output(cond), unit)

    def _difference(self, index):
        if index not in self.differences:
            self.differences[index] = GuidanceCache(self.settings.guidance, self.percent_to_sigma)
        return self.differences[index]

    def _forget_if_changed(self, evaluation, conds, x):
        seen = fingerprint(conds, evaluation.sigma, x)
        if self.seen is not None and seen != self.seen:
            self.reset()
        self.seen = seen

    def _methods(self):
        return [*([self.jump] if self.jump else []), *self.differences.values()]
