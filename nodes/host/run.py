"""One sampling run: its evaluations, their scopes and features, and the report it ends with.

Made when the run starts and dropped when it ends, however it ends. Nothing of it outlives the
run but its report.
"""
import time
from collections import Counter
from dataclasses import replace

from ...fastercache_core.auto import LONGEST_REUSE, least
from ...fastercache_core.clock import Clock
from ...fastercache_core.mixing import MixSettings
from ...fastercache_core.report import EvaluationRecord, RunReport
from ...fastercache_core.schedule import Action
from .branches import branch_keys, branch_name, keys_ahead, reference_branch, window_of
from .features import Features, is_compiled
from .output_space import OutputSpace, SlopeSpace
from .plans import REUSING, make_plan
from .refusals import refusals
from .samplers import sampler_facts, sampler_name
from .scope import Scope

# From the most to the least that runs.
ACTIONS = [Action.FULL, Action.MIX, Action.REUSE, Action.ESTIMATE, Action.JUMP]
# A context window that has not come back for this many evaluations is forgotten.
SCOPE_LIFE = 8


class CacheRun:
    """State of one run of one model under `settings` (CacheSettings)."""

    def __init__(self, settings, guider, sampler, sigmas, shape):
        """shape: of the latent, [batch, channels, ...]."""
        self.guider = guider
        self.report = RunReport(run=describe(settings, guider, sampler, sigmas))
        refused = refusals(settings, guider, sampler)
        for reason in dict.fromkeys(refused.values()):
            self.report.note(reason)
        self.settings = replace(settings, **dict.fromkeys(refused))
        if not any((settings.guidance, settings.reuse, settings.jump)):
            self.report.note("every method is switched off: nothing is skipped")
        self.model_sampling = guider.model_patcher.get_model_object("model_sampling")
        self.plan, self.planned = make_plan(self.settings, self.guider, sampler, sigmas.tolist(), shape), None
        for note in self.plan.notes if self.plan else ():
            self.report.note(note)
        facts = sampler_facts(sampler)
        self.walks_grid = facts is not None and facts.calls == 1 and not facts.noise
        self.solver = facts.solver if facts else None
        self._fit_settings(facts, sampler_name(sampler))
        self.features = self._features()
        self.space = SlopeSpace if isinstance(self.settings.plan, MixSettings) else OutputSpace
        self.clock = Clock(sigmas.tolist())
        self.started = self.evaluation_started = time.perf_counter()
        self.scopes, self.passes, self.seen, self.ahead = {}, {}, Counter(), []
        self.evaluation = self.record = self.reference = None
        self.reused, self.kinds, self.trying, self.trials = set(), set(), False, 0
        self.full_rows, self.guided, self.alone = 0, False, False

    def begin(self, timestep):
        """A new evaluation starts; timestep: [batch] sigmas."""
        self._close_evaluation()
        sigma = self._sigma(timestep)
        self.evaluation = self.clock.tick(sigma)
        self.record = EvaluationRecord(self.evaluation.ordinal, sigma, {})
        self.report.evaluations.append(self.record)
        self.passes, self.seen = {}, Counter()
        self.planned = self.plan.at(self.evaluation) if self.plan else None
        if self.features:
            self.features.begin(self.evaluation, self.planned and self.planned.action in REUSING)

    def first_pass(self, model_options):
        """True for the pass that guidance itself asks for, False for what other nodes add to it.

        Skip-layer, perturbed and self-attention guidance run the network again within the same
        evaluation, with other blocks or another latent: those passes are left alone.
        """
        window = window_of(model_options["transformer_options"])
        self.passes[window] = self.passes.get(window, 0) + 1
        return self.passes[window] == 1

    def evaluate(self, run_branches, conds, x, timestep, model_options):
        """Denoised outputs of all branches, computed or not; see Scope.evaluate.

        timestep: [batch] sigmas.
        """
        reference = reference_branch(conds, self.guider.conds)
        if reference is None:
            self.report.note("the positive conditioning of this guider was not found: nothing is skipped")
            return run_branches(conds)
        self.reference = reference
        window = window_of(model_options["transformer_options"])
        self.ahead = keys_ahead(conds, window, x.shape, self.evaluation.sigma)
        scope = self._scope(window)
        space = self.space(self.model_sampling, timestep, x)

        def run_chosen(chosen, reuse=None, trial=False):
            self.alone = not any(c for i, c in enumerate(chosen) if i != reference)
            if not self._begin_passes(reuse, trial, model_options["transformer_options"]):
                return None, set()
            return run_branches(chosen), self.kinds

        outputs, actions = scope.evaluate(self.evaluation, run_chosen, conds, reference, x, space, self.planned)
        self.guided |= len(actions) > 1
        for i, action in actions.items():
            reused = action == Action.FULL and i in self.reused
            self._note_action(branch_name(i, reference, len(conds)), Action.REUSE if reused else action)
        return outputs

    def apply_model(self, executor, args, kwargs):
        """Run the network once for one batch of chunks, with features from the cache if due.

        args: x, t, c_concat, c_crossattn, control, transformer_options.
        """
        self.record.rows += 0 if self.trying else args[0].shape[0]
        window = window_of(args[5])
        if self.features is None or self.passes.get(window) != 1:
            return executor(*args, **kwargs)
        branches = branch_keys(args[5], window, args[0].shape, self.seen)
        # A difference is only worth keeping between branches computed alike, however the host batches them;
        # features of a branch that is mostly estimated would go stale before they are of use.
        together = self.plan or self.settings.auto or not self.settings.guidance
        alike = self.alone or together
        is_kept = lambda branch: not self.trying and (together or branch[1] == self.reference)
        kept = [branch if is_kept(branch) else None for branch in branches]
        output, reused = self.features.run(executor, args, kwargs, branches, kept, alike,
                                           [branch for branch in self.ahead if is_kept(branch)])
        if reused:
            self.reused.update(branch[1] for branch in branches)
            self.kinds |= reused
        return output

    def close(self):
        """End the run: drop every tensor, finish the report."""
        self._close_evaluation()
        if self.features:
            self._close_features()
        self._explain()
        self.report.seconds = time.perf_counter() - self.started
        self.scopes, self.features, self.guider = {}, None, None

    def _begin_passes(self, reuse, trial, options):
        """Begin to run branches, see Scope.evaluate; False where nothing can be tried."""
        self.reused, self.kinds, self.trying = set(), set(), trial
        if self.features and reuse is not None:
            self.seen = Counter()
            self.features.begin(self.evaluation, reuse)
            if trial and not self.features.reusable(self.ahead, options):
                return False
        self.trials += trial
        return True

    def _sigma(self, timestep):
        """The sigma as a float, without waiting for the device where the sampler's next one is known."""
        following = self.clock.ordinal + 1
        if self.walks_grid and following < len(self.clock.grid):
            return self.clock.grid[following]
        return float(timestep.flatten()[0])

    def _explain(self):
        """Say why nothing was skipped, if nothing was."""
        chosen = self.settings
        if chosen.guidance and not self.guided:
            self.report.note("no unconditional pass to skip: cfg is 1.0, there is no negative, or another "
                             "node runs it by itself")
        able = chosen.jump or chosen.reuse or (chosen.guidance and self.guided)
        if able and not self._skipped():
            self.report.note(self._why_nothing())

    def _why_nothing(self):
        """Why nothing was skipped although something could have been."""
        chosen = self.settings
        if not (chosen.gate or chosen.auto):
            return "nothing was skipped: the interval, the window or the few steps left nothing to skip"
        left = chosen.auto and not (self.solver or self.features)
        more = "; feature_reuse may still find something to save" if left else ""
        return ("the forecasts of this run were not good enough to skip anything: too few steps, or too much "
                f"change between them{more}")

    def _fit_settings(self, facts, sampler):
        """Have the automatic mode ask for no less than is to be had, and reuse features only where that helps.

        facts: SamplerFacts of the `sampler` of this name, or None.
        """
        chosen, at_least = self.settings, least(self.solver, bool(facts and facts.noise))
        if chosen.auto and chosen.auto.closeness < at_least:
            self.settings = replace(chosen, auto=replace(chosen.auto, closeness=at_least))
            if chosen.guidance or chosen.jump:
                self.report.note(f"{chosen.auto.closeness:g} dB counts as {at_least:g} dB with sampler {sampler}: "
                                 "below that, its forecasts are not reliable")
        if chosen.auto and self.solver and chosen.reuse:
            self.settings = replace(self.settings, reuse=None)
            self.report.note(f"with sampler {sampler} whole steps are skipped, which was closer at the same cost than "
                             "reused features: none are kept")

    def _skipped(self):
        return any({*record.actions.values()} - {Action.FULL.value} for record in self.report.evaluations)

    def _scope(self, window):
        stale = [w for w, s in self.scopes.items() if self.evaluation.ordinal - s.used_at > SCOPE_LIFE]
        for key in stale:
            del self.scopes[key]
        if window not in self.scopes:
            percent_to_sigma = self.model_sampling.percent_to_sigma
            self.scopes[window] = Scope(self.settings, percent_to_sigma, guidance_scale(self.guider), self.solver,
                                        is_compiled(self.guider.model_patcher))
        return self.scopes[window]

    def _features(self):
        """What reuses features in this run, None when nothing does."""
        if self.settings.reuse is None or (self.plan and not self.plan.reuses):
            return None
        reuse = self.settings.reuse.within(LONGEST_REUSE + 1) if self.settings.auto else self.settings.reuse
        return Features(reuse, self.guider.model_patcher, self.model_sampling.percent_to_sigma)

    def _close_features(self):
        """Hand the memory back, and tell what was kept in it."""
        plan = self.report.run["features"] = self.features.close()
        for reason in self.features.notes:
            self.report.note(reason)
        if not plan["sites"]:
            self.settings = replace(self.settings, reuse=None)
        elif self.settings.auto:
            self._tell_trials()

    def _tell_trials(self):
        """Say what the automatic mode made of the features that it had."""
        if self.trials:
            self.report.note(f"features were tried {self.trials} times, by running what was computed once more with "
                             "features from the cache")
        if not any(Action.REUSE in record.actions.values() for record in self.report.evaluations):
            self.report.note("features were kept but not reused: " + (
                "with them the picture would not be as close as asked for" if self.trials else
                "there were too few steps to try them"))

    def _note_action(self, name, action):
        # Windows of one evaluation may differ; the one that ran most is told.
        known = self.record.actions.get(name)
        if known is None or ACTIONS.index(action) < ACTIONS.index(Action(known)):
            self.record.actions[name] = action.value

    def _close_evaluation(self):
        now = time.perf_counter()
        if self.record is not None:
            self.record.seconds = now - self.evaluation_started
            if set(self.record.actions.values()) <= {Action.FULL.value, Action.REUSE.value, Action.MIX.value}:
                self.full_rows = self.record.rows
            self.record.rows_full = max(self.full_rows, self.record.rows)
            self.report.note_memory([*self.scopes.values(), *([self.features] if self.features else [])])
        self.record = None
        self.evaluation_started = now


def guidance_scale(guider):
    """The largest scale by which a guider multiplies differences between its branches."""
    return max(getattr(guider, name, 1.0) for name in ("cfg", "cfg1", "cfg2"))


def describe(settings, guider, sampler, sigmas):
    """The `run` part of a report: which model, sampler and sigmas, under which settings."""
    return {"model": type(guider.model_patcher.model).__name__, "settings": settings.label,
            "sampler": sampler_name(sampler), "steps": len(sigmas) - 1,
            "cfg": getattr(guider, "cfg", None), "sigmas": [round(s, 6) for s in sigmas.tolist()]}
