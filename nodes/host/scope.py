"""The branches of one latent region: which of them run, and how the others are filled in.

A run has one scope, or one per context window of a long video.
"""
from ...fastercache_core.auto import Foresight, Rhythm
from ...fastercache_core.correction import Correction
from ...fastercache_core.gate import ErrorEstimate, Gate, rms
from ...fastercache_core.guidance import GuidanceCache
from ...fastercache_core.jump import JumpCache
from ...fastercache_core.mixing import mix
from ...fastercache_core.schedule import Action
from ...fastercache_core.trial import Trial
from ...fastercache_core.weighed import WeighedHistory
from .branches import branch_is_active, fingerprint


class Scope:
    """Outputs and differences of one region, kept across the evaluations of a run."""

    def __init__(self, settings, percent_to_sigma, guidance_scale, solver=None, late=False):
        """guidance_scale: the guider's cfg, by which errors of differences are multiplied; solver: the
        sampler's, if it is one whose wrong steps the automatic mode can make good, see `correction`; late: never
        let the host wait for the device, see Reading.
        """
        self.settings = settings
        self.measures = bool(settings.gate or settings.auto)
        self.solver = solver if settings.auto else None
        self.corrections = {}
        self.rhythm = Rhythm(settings.auto, percent_to_sigma, solver, late) if settings.auto else None
        self.trial = Trial() if settings.auto and settings.reuse else None
        self.guidance_scale = guidance_scale
        self.percent_to_sigma = percent_to_sigma
        self.watch = Foresight if settings.auto else ErrorEstimate
        self.jump = JumpCache(settings.jump, percent_to_sigma, self.watch()) if settings.jump else None
        self.differences = {}
        self.gates = {Action.JUMP: Gate(settings.gate), Action.ESTIMATE: Gate(settings.gate)}
        self.seen = None
        self.used_at = -1

    def evaluate(self, evaluation, run_branches, conds, reference, x, space, planned=None):
        """Denoised outputs of all branches and the action of each, dict index -> Action.

        run_branches(conds, reuse, trial) runs the network for a list of conditionings (None: not run) and tells
        which kinds of features were reused; reuse: whether they shall be, None to go by intervals or plan;
        trial: leave no trace, and run nothing where features cannot be reused. reference: index of the branch
        that the others are estimated from. x: the latent [batch, ...]. space: the OutputSpace of this
        evaluation. planned: the Step that a plan wants, None to choose by intervals and gates.
        """
        self.used_at = evaluation.ordinal
        self._forget_if_changed(evaluation, conds, x)
        active = [i for i, branch in enumerate(conds) if branch_is_active(branch, evaluation.sigma)]
        others = [i for i in active if i != reference]
        action = self._choose(evaluation, reference in active, others, planned)
        if action in (Action.FULL, Action.REUSE, Action.MIX):
            outputs, reused = self._run(action, evaluation, run_branches, conds, reference, others, x, space)
            if action == Action.MIX and reused:
                outputs = self._mix(outputs, planned, evaluation, reference, others, x, space)
            elif action == Action.REUSE and reused:
                self.rhythm.reused()
            else:
                action = Action.FULL
            if not (reused and (planned or action == Action.REUSE)):
                self._observe(evaluation, outputs, reference, active, space, x)
        else:
            outputs = self._fill(action, evaluation, run_branches, conds, reference, others, x, space, planned)
        if self.solver and reference in active:
            outputs = self._corrected(outputs, action, evaluation, reference, others, space)
        actions = dict.fromkeys(active, action)
        if action == Action.ESTIMATE:
            actions[reference] = Action.FULL
        return outputs, actions

    def reset(self):
        """Forget everything, so that the next evaluation is full."""
        for part in (*self._methods(), self.rhythm, self.trial):
            if part:
                part.reset()
        self.corrections.clear()

    def tensors(self):
        """Every tensor held."""
        return [t for holder in (*self._methods(), *self.corrections.values()) for t in holder.tensors()]

    def _choose(self, evaluation, has_reference, others, planned):
        if not has_reference:
            return Action.FULL
        known = [self.differences.get(i) for i in others]
        if planned:
            return self._planned(planned, known)
        if self.rhythm:
            return self._in_rhythm(evaluation, known)
        if self.jump and self.jump.may_jump(evaluation) and all(d and d.history.ready for d in known):
            if self.gates[Action.JUMP].allows(m.effect(evaluation) for m in (self.jump, *known)):
                return Action.JUMP
        if others and all(d and d.may_estimate(evaluation) for d in known):
            # An error may be as large as the share of the work that it saves.
            share = len(others) / (len(others) + 1)
            if self.gates[Action.ESTIMATE].allows(d.effect(evaluation) / share for d in known):
                return Action.ESTIMATE
        return Action.FULL

    def _in_rhythm(self, evaluation, known):
        """The action of the automatic mode: JUMP, ESTIMATE where this sampler allows no JUMP, or REUSE."""
        methods = [*([self.jump] if self.jump else []), *known]
        if not (methods or self.trial) or not all(m and len(m.history.nodes) > 1 for m in methods):
            return Action.FULL
        skips = self.rhythm.may_skip(evaluation, [m.error for m in methods], self.trial)
        if self.rhythm.may_reuse(evaluation):
            return Action.REUSE
        if not skips:
            return Action.FULL
        return Action.JUMP if self.jump else Action.ESTIMATE

    def _planned(self, planned, known):
        """The action of a plan, FULL where it cannot be taken: too few values are known yet."""
        action = Action(planned.action)
        ready = lambda method, values: method and len(method.history.nodes) >= (len(values) or method.history.depth)
        foreseen = all(ready(d, planned.difference) for d in known)
        if action == Action.ESTIMATE and known and foreseen:
            return action
        if action in (Action.JUMP, Action.MIX) and foreseen and ready(self.jump, planned.cond):
            return action
        return Action.FULL

    def _run(self, action, evaluation, run_branches, conds, reference, others, x, space):
        """Denoised outputs of all branches by the network, and the kinds of features that were reused for them."""
        if self.trial is None:
            return run_branches(conds)
        tried = ()
        if action == Action.FULL and self.rhythm.last is not None and self.trial.due(evaluation):
            outputs, tried = run_branches(conds, reuse=True, trial=True)
        true, reused = run_branches(conds, reuse=action == Action.REUSE)
        if tried:
            error = self._wrong(outputs, true, reference, others, x, space)
            self.trial.observe(evaluation, error, evaluation.ordinal - self.rhythm.last.ordinal, tried)
        return true, reused

    def _wrong(self, outputs, true, reference, others, x, space):
        """Relative error of the latent's slope by denoised `outputs` in place of `true` ones, [batch]."""
        error = rms(space.difference(outputs[reference], true[reference]))
        for i in others:
            change = (outputs[i] - outputs[reference]) - (true[i] - true[reference])
            error = error + rms(change / space.scale) * abs(self.guidance_scale - 1)
        return error * space.unit(x)

    def _fill(self, action, evaluation, run_branches, conds, reference, others, x, space, planned):
        if action == Action.JUMP:
            values = planned.cond if planned else ()
            cond = space.denoised(self.jump.cond(evaluation, values).to(x.dtype))
        else:
            alone = [c if i == reference else None for i, c in enumerate(conds)]
            outputs, _ = run_branches(alone, reuse=False if self.trial else None)
            cond = outputs[reference]
            if not planned:
                self._observe_reference(evaluation, cond, space, x)
        outputs = [cond.new_zeros(cond.shape) if i not in (reference, *others) else cond
                   for i in range(len(conds))]  # the host leaves inactive branches at zero
        for i in others:
            values = planned.difference if planned else ()
            outputs[i] = self.differences[i].estimate(evaluation, cond, space.scale, values)
        return outputs

    def _corrected(self, outputs, action, evaluation, reference, others, space):
        """Outputs of an evaluation, with what forecasts before it got wrong made good."""
        cond, shifts = outputs[reference], {}
        for i, method in [(reference, self.jump), *((i, self.differences.get(i)) for i in others)]:
            correction = self.corrections.setdefault(i, Correction(self.solver))
            if method and action == Action.FULL:
                shifts[i] = correction.settle(evaluation, method.history, space.scale)
            elif method:
                signal = space.output(cond) if i == reference else space.difference(outputs[i], cond)
                shifts[i] = correction.forecast(evaluation, signal, space.scale)
        corrected = [*outputs]
        for i in (reference, *others):
            own = [shifts[j] for j in {reference, i} if shifts.get(j) is not None]
            if own:
                corrected[i] = space.add(outputs[i], sum(own))
        return corrected

    def _mix(self, outputs, planned, evaluation, reference, others, x, space):
        held = self._fill(Action.JUMP, evaluation, None, outputs, reference, others, x, space, planned)
        return [mix(outputs[i], held[i], planned.mix) if i in (reference, *others) else output
                for i, output in enumerate(outputs)]

    def _observe(self, evaluation, outputs, reference, active, space, x):
        if reference not in active:
            return
        cond = outputs[reference]
        self._observe_reference(evaluation, cond, space, x)
        if self.rhythm:
            self.rhythm.computed(evaluation)
        unit = space.unit(x if self.rhythm else cond) * abs(self.guidance_scale - 1) if self.measures else None
        for i in active if self.settings.guidance else ():
            if i != reference:
                self._difference(i).observe(evaluation, space.difference(outputs[i], cond), unit)

    def _observe_reference(self, evaluation, cond, space, x):
        if self.jump:
            unit = space.unit(x if self.rhythm else cond) if self.measures else None
            self.jump.observe(evaluation, space.output(cond), unit)

    def _difference(self, index):
        if index not in self.differences:
            # Where only the negative pass is estimated, every second time at most, the measured forecast was closer.
            self.differences[index] = GuidanceCache(self.settings.guidance, self.percent_to_sigma, self.watch(),
                                                    WeighedHistory() if self.solver else None)
        return self.differences[index]

    def _forget_if_changed(self, evaluation, conds, x):
        seen = fingerprint(conds, evaluation.sigma, x)
        if self.seen is not None and seen != self.seen:
            self.reset()
        self.seen = seen

    def _methods(self):
        return [*([self.jump] if self.jump else []), *self.differences.values()]
