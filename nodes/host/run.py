"""One sampling run: its evaluations, an engine for every region, and the report that it ends with.

Made when the run starts and dropped when it ends, however it ends. Nothing of it outlives the run but its report.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Protocol

import torch
from comfy.model_sampling import CONST

from ...fastercache_core import messages
from ...fastercache_core.actions import Action, fuller
from ...fastercache_core.clock import Clock, Evaluation
from ...fastercache_core.controllers.adaptive import AdaptiveSettings
from ...fastercache_core.controllers.planned import flow_timestep
from ...fastercache_core.engine import Engine, Outcome
from ...fastercache_core.protocols import Observer, Pass, RunContext
from ...fastercache_core.report import EvaluationRecord, RunReport
from ...fastercache_core.settings import CacheSettings
from ...fastercache_core.solvers import Solver
from ...fastercache_core.walk import Walk
from .compatibility import RunSetup, compatible, is_compiled, sampler_name
from .conditioning import Window, active_branches, branch_name, fingerprint, reference_branch, window_of
from .feature_pass import FeaturePass
from .learning import law_of
from .model_call import BranchesCall
from .network import HostNetwork
from .policy_checks import planned
from .prediction import OutputSpace, SlopeSpace

# A context window that has not come back for this many evaluations is forgotten.
REGION_LIFE = 8
# In so few steps little can be predicted without a policy: where less than this share was, one would help. Finding it
# takes the time of so many pictures: 4 in full, and 4 at three quarters of the cost.
FEW_STEPS, LITTLE, POLICY_PICTURES = 12, 0.3, 7


class RunObserver(Observer, Protocol):
    """Looks at a whole run, for calibration."""

    def started(self, setup: RunSetup) -> None:
        """A run starts."""

    def check(self, pass_: Pass | None, window: Window) -> None:
        """The first pass of an evaluation begins; None where the guider's positive conditioning was not found."""

    def done(self, evaluation: Evaluation, x: torch.Tensor, denoised: torch.Tensor) -> None:
        """An evaluation at latent `x` gave the guided `denoised`, both [batch, ...]."""

    def closed(self) -> None:
        """The run has ended."""


class CacheRun:
    """One run of one model under `settings`."""

    def __init__(self, settings: CacheSettings, setup: RunSetup, observer: RunObserver | None = None) -> None:
        self.setup, self.observer = setup, observer
        if observer:
            observer.started(setup)
        self.report = RunReport(run=describe(settings, setup))
        settings, reasons = compatible(settings, setup)
        self.settings, notes = planned(settings, setup)
        for note in (*reasons, *notes):
            self.report.note(note)
        self.context = self._context()
        self.walk = self._walk()
        self.features = self._features()
        self.space = SlopeSpace if settings.controller.holds_slope else OutputSpace
        self.clock = Clock(setup.sigmas)
        self.started = self.evaluation_started = time.perf_counter()
        self.regions: dict[Window, Engine] = {}
        self.passes: set[Window] = set()
        self.evaluation: Evaluation | None = None
        self.record: EvaluationRecord | None = None
        self.full_rows, self.probes = 0, 0

    def begin(self, x: torch.Tensor, timestep: torch.Tensor) -> None:
        """A new evaluation starts at latent `x` [batch, ...]; timestep: [batch] sigmas."""
        self._close_evaluation()
        if self.walk and not self.walk.follows(x):
            self._stand_down()
        sigma = self._sigma(timestep)
        self.evaluation = self.clock.tick(sigma)
        self.record = EvaluationRecord(self.evaluation.ordinal, sigma, {})
        self.report.evaluations.append(self.record)
        self.passes.clear()
        if self.features:
            self.features.begin(self.evaluation)

    def done(self, x: torch.Tensor, denoised: torch.Tensor) -> None:
        """The evaluation at latent `x` gave the guided `denoised`, both [batch, ...]."""
        if self.walk:
            self.walk.took(denoised)
        if self.observer and self.evaluation:
            self.observer.done(self.evaluation, x, denoised)

    def first_pass(self, options: dict[str, Any]) -> bool:
        """True for the pass that guidance itself asks for, False for what other nodes add to it.

        Skip-layer, perturbed and self-attention guidance run the network again within the same evaluation, with other
        blocks or another latent: those passes are left alone. options: the model's.
        """
        window = window_of(options["transformer_options"])
        first = self.evaluation is not None and window not in self.passes
        self.passes.add(window)
        return first

    def evaluate(self, call: BranchesCall) -> list[torch.Tensor]:
        """Denoised latents of all branches, computed or not; see Engine.evaluate."""
        assert self.evaluation is not None
        window, evaluation = window_of(call.options["transformer_options"]), self.evaluation
        pass_ = self._pass(call, evaluation)
        if self.observer:
            self.observer.check(pass_, window)
        if pass_ is None:
            self.report.note(messages.NO_REFERENCE)
            return call.run(call.conds)
        network = HostNetwork(
            call, self.features, self.settings.controller.reference_only and self.settings.difference is not None
        )
        outcome = self._region(window).evaluate(pass_, network)
        self._record(outcome, pass_)
        return outcome.outputs

    def count(self, rows: int) -> None:
        """`rows` entered the network."""
        if self.record:
            self.record.rows += rows

    def close(self) -> None:
        """End the run: drop every tensor, finish the report."""
        self._close_evaluation()
        reuses = self._close_features(self.features) if self.features else False
        self._close_errors()
        if self.observer:
            self.observer.closed()
        if not self._lost:
            self._explain(reuses)
        self.report.seconds = time.perf_counter() - self.started
        self.regions, self.features, self.observer, self.walk = {}, None, None, None

    def _context(self) -> RunContext:
        setup, settings, sampling = self.setup, self.settings, self.setup.model_sampling
        timestep = flow_timestep
        if not isinstance(sampling, CONST):
            timestep = lambda sigma: float(sampling.timestep(sampling.sigmas.new_tensor(sigma)))
        return RunContext(
            sampling.percent_to_sigma,
            setup.guidance_scale,
            self._solver(),
            setup.sigmas,
            timestep,
            late=is_compiled(setup.guider.model_patcher),
            predicts=settings.output is not None,
            estimates=settings.difference is not None,
            reuses=settings.reuse is not None,
        )

    def _solver(self) -> Solver:
        """What is known of the sampler, with what was learnt on this model."""
        solver = self.setup.solver or Solver()
        adaptive = isinstance(self.settings.controller, AdaptiveSettings)
        return replace(solver, law=law_of(self.setup, self.report)) if adaptive else solver

    def _walk(self) -> Walk | None:
        """What watches a sampler that counts as the one it wraps, None for others."""
        if not (self.setup.wrapped and self.settings.output):
            return None
        self.report.note(messages.wraps(self.setup.sampler_name, sampler_name(self.setup.wrapped)))
        return Walk(self.context.solver, self.setup.sigmas)

    def _stand_down(self) -> None:
        """The sampler is not what it was taken for: compute everything from here on."""
        self.report.note(messages.not_wrapped(self.setup.sampler_name, sampler_name(self.setup.wrapped)))
        self.settings = replace(self.settings, output=None, difference=None, reuse=None)
        self.context, self.walk, self.regions, self.features = self._context(), None, {}, None

    def _features(self) -> FeaturePass | None:
        """What reuses features in this run, None when nothing does."""
        reuse, longest = self.settings.reuse, self.settings.controller.longest_reuse
        if reuse is None:
            return None
        if longest is not None:
            reuse = reuse.within(longest + 1)
        return FeaturePass(reuse, self.setup.guider.model_patcher, self.setup.model_sampling.percent_to_sigma)

    def _sigma(self, timestep: torch.Tensor) -> float:
        """The sigma as a float, without waiting for the device where the sampler's next one is known."""
        following = self.clock.ordinal + 1
        if self.setup.solver and self.setup.solver.walks_grid and following < len(self.clock.grid):
            return self.clock.grid[following]
        return float(timestep.flatten()[0])

    def _pass(self, call: BranchesCall, evaluation: Evaluation) -> Pass | None:
        """The pass of an evaluation, None where the branch that others are estimated from is not known."""
        reference = reference_branch(call.conds, self.setup.guider.conds)
        if reference is None:
            return None
        active = active_branches(call.conds, evaluation.sigma)
        parts = self.setup.parts if call.x.shape[-1] == sum(self.setup.parts) else ()  # other in a context window
        space = self.space(self.setup.model_sampling, call.timestep, call.x, parts)
        same = fingerprint(call.conds, evaluation.sigma, call.x)
        return Pass(evaluation, call.conds, reference, active, call.x, space, same)

    def _region(self, window: Window) -> Engine:
        assert self.evaluation is not None
        now = self.evaluation.ordinal
        self.regions = {w: engine for w, engine in self.regions.items() if now - engine.used_at <= REGION_LIFE}
        if window not in self.regions:
            self.regions[window] = Engine(self.settings, self.context, self.observer)
        return self.regions[window]

    def _record(self, outcome: Outcome, pass_: Pass) -> None:
        """Put what an evaluation did into the report; of windows that differ, what ran most."""
        assert self.record is not None
        self.record.probe_rows += outcome.probe_rows
        self.probes += outcome.probe_rows > 0
        for i, action in outcome.actions.items():
            name = branch_name(i, pass_.reference, len(pass_.branches))
            before = self.record.actions.get(name)
            self.record.actions[name] = fuller(action, Action(before) if before else None).value

    def _close_evaluation(self) -> None:
        now = time.perf_counter()
        if self.record is not None:
            record, actions = self.record, {Action(action) for action in self.record.actions.values()}
            record.seconds = now - self.evaluation_started
            computed = record.rows - record.probe_rows
            if not actions & {Action.ESTIMATE, Action.PREDICT}:
                self.full_rows = computed
            record.rows_full = max(self.full_rows, computed)
            self.report.note_memory([*self.regions.values(), *([self.features] if self.features else [])])
        self.record = None
        self.evaluation_started = now

    def _close_features(self, features: FeaturePass) -> bool:
        """Hand the memory back, and report what was kept in it; False where nothing had room."""
        plan = self.report.run["features"] = features.close()
        for reason in () if self._lost else features.notes:
            self.report.note(reason)
        if plan["sites"] and self.settings.controller.probes and not self._lost:
            if self.probes:
                self.report.note(messages.probed(self.probes))
            if not any(Action.REUSE in record.actions.values() for record in self.report.evaluations):
                self.report.note(messages.features_not_reused(self.probes > 0))
        return bool(plan["sites"])

    def _close_errors(self) -> None:
        """Report the errors of a whole run and what they mean for its picture, where it was not in context windows."""
        engine, complete = self.regions.get(None), self.evaluation and self.evaluation.is_last
        spent = engine.finish() if engine and complete else None
        if spent:
            expected = self.context.solver.law.closeness(spent)
            self.report.run |= {"spent": spent, "expected": [round(value, 2) for value in expected]}

    @property
    def _lost(self) -> bool:
        """True when the positive conditioning was never found, which explains everything else."""
        return messages.NO_REFERENCE in self.report.notes and not self.regions

    def _explain(self, reuses: bool) -> None:
        """Say why nothing was skipped, if nothing was. reuses: features had room."""
        settings, evaluations = self.settings, [r.actions for r in self.report.evaluations]
        guided = any(len(actions) > 1 for actions in evaluations)
        if settings.difference and not guided:
            self.report.note(messages.NO_UNCOND)
        able = settings.output or reuses or (settings.difference and guided)
        skipped = any({*actions.values()} - {Action.COMPUTE.value} for actions in evaluations)
        if settings.found and settings.output and settings.controller.uses_errors and len(evaluations) <= FEW_STEPS:
            predicted = sum({*actions.values()} == {Action.PREDICT.value} for actions in evaluations)
            if predicted < LITTLE * len(evaluations):
                self.report.note(messages.policy_would_help(POLICY_PICTURES))
        if able and not skipped:
            may_help = settings.controller.probes and not (self.context.solver.corrects or reuses)
            self.report.note(messages.nothing_skipped(settings.controller.uses_errors, may_help))


def describe(settings: CacheSettings, setup: RunSetup) -> dict[str, Any]:
    """The `run` part of a report: which model, sampler and sigmas, under which settings."""
    return {
        "model": type(setup.guider.model_patcher.model).__name__,
        "settings": settings.label,
        "sampler": setup.sampler_name,
        "steps": len(setup.sigmas) - 1,
        "cfg": setup.cfg,
        "sigmas": [round(s, 6) for s in setup.sigmas],
    }
