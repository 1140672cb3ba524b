"""One sampling run: its evaluations, an engine for every region, and the report that it ends with.

Made when the run starts and dropped when it ends, however it ends. Nothing of it outlives the run but its report.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any, Protocol

import torch

from ...fastercache_core import messages
from ...fastercache_core.actions import Action, fuller
from ...fastercache_core.clock import Clock, Evaluation
from ...fastercache_core.controllers.adaptive import AdaptiveSettings
from ...fastercache_core.engine import Engine, Outcome
from ...fastercache_core.guidance import shares
from ...fastercache_core.protocols import Observer, Pass, RunContext
from ...fastercache_core.report import EvaluationRecord, RunReport
from ...fastercache_core.settings import CacheSettings
from ...fastercache_core.solvers import Solver
from ...fastercache_core.walk import Stride, Walk
from .compatibility import RunSetup, compatible, is_compiled, on_several_devices, sampler_name
from .compiler import compiles, tolerates_changes
from .conditioning import (
    Window,
    active_branches,
    branch_name,
    fingerprint,
    reference_branch,
    rows_asked,
    uuids,
    window_of,
)
from .feature_pass import FeaturePass
from .learning import law_of
from .model_call import BranchesCall, ModelCall, uncompiled
from .network import REQUEST_KEY, HostNetwork
from .network_watch import NetworkWatch
from .policy_checks import planned
from .prediction import DenoisedSpace, OutputSpace, SlopeSpace

# A context window that has not come back for this many evaluations is forgotten.
REGION_LIFE = 8
# Where less than this share of few steps was predicted, a policy would help. Finding it takes the time of so many
# pictures: 4 in full, and 4 at three quarters of the cost.
LITTLE, POLICY_PICTURES = 0.3, 7


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
        for note in (*settings.notes, *reasons, *notes):
            self.report.note(note)
        self.context = self._context()
        self.walk = self._walk()
        self.stride = Stride() if self.context.solver.corrects and not (self.walk or self.context.late) else None
        self.watch: NetworkWatch | None = None
        self.features = self._features()
        self.clock = Clock(setup.sigmas)
        self.started = self.evaluation_started = time.perf_counter()
        self.regions: dict[Window, Engine] = {}
        self.passes: set[Window] = set()
        self.positive = uuids(getattr(setup.guider, "conds", {}).get("positive"))
        self.x: torch.Tensor | None = None
        self.extras: list[torch.Tensor] = []  # what other nodes computed beside the branches
        self.unnamed: tuple[Any, list[torch.Tensor]] | None = None  # branches of which none is known to be positive
        self.answered: set[int] = set()  # evaluations at which another cache answered
        self.evaluation: Evaluation | None = None
        self.record: EvaluationRecord | None = None
        self.asked, self.rows_each, self.probes = 0, 1.0, 0
        self.counting = threading.Lock()  # batches may enter networks on several devices at once

    def begin(self, x: torch.Tensor, timestep: torch.Tensor) -> None:
        """A new evaluation starts at latent `x` [batch, ...]; timestep: [batch] sigmas."""
        self._close_evaluation()
        if self.watch is None and not self.context.late and not on_several_devices(self.setup.guider.model_patcher):
            # Before others put something in place of its blocks, as some do for each call.
            self.watch = NetworkWatch(uncompiled(self.setup.guider.model_patcher.model.diffusion_model))
        sigma = self._sigma(timestep)
        self.x = x
        if self.walk and not self.walk.follows(x):
            self._stand_down()
            self.report.note(messages.not_wrapped(self.setup.sampler_name, sampler_name(self.setup.wrapped)))
        if self.stride and self.stride.strays(x, sigma):
            self._forget()
        self.evaluation = self.clock.tick(sigma)
        self.record = EvaluationRecord(self.evaluation.ordinal, sigma, {})
        self.report.evaluations.append(self.record)
        self.passes.clear()
        self.extras.clear()
        if self.features:
            self.features.begin(self.evaluation, x)

    def done(self, x: torch.Tensor, denoised: torch.Tensor) -> None:
        """The evaluation at latent `x` gave the guided `denoised`, both [batch, ...]."""
        assert self.evaluation is not None
        if self.walk:
            self.walk.took(denoised)
        if self.stride:
            self.stride.took(x, self.evaluation.sigma, denoised)
        if not self.passes:
            self._make_way()
        for window in self.passes & {*self.regions}:
            part = denoised if window is None else window.of(denoised)
            if part is not None:
                self.regions[window].guided(part, self.extras if window is None else ())
        self._find_positive(denoised)
        if self.observer:
            self.observer.done(self.evaluation, x, denoised)

    def first_pass(self, call: BranchesCall) -> bool:
        """True for the pass that guidance itself asks for, False for what other nodes add to it, and for a part of the
        latent that cannot be told from others.

        Skip-layer, perturbed and self-attention guidance run the network again within the same evaluation, with other
        blocks or another latent: those passes are left alone.
        """
        window = window_of(call.options["transformer_options"])
        if self.evaluation is None or window in self.passes:
            return False
        self.asked = self.asked * bool(self.passes) + rows_asked(call.conds, self.evaluation.sigma, len(call.x))
        self.passes.add(window)
        whole = call.x is self.x or (self.x is not None and torch.equal(call.x, self.x))
        if window is None and not whole:
            self.report.note(messages.UNKNOWN_REGION)
            return False
        return True

    def extra(self, call: BranchesCall) -> list[torch.Tensor]:
        """Denoised latents of a pass that another node added."""
        outputs = call.run(call.conds)
        self.extras += [output for output, branch in zip(outputs, call.conds, strict=True) if branch]
        return outputs

    def evaluate(self, call: BranchesCall) -> list[torch.Tensor]:
        """Denoised latents of all branches, computed or not; see Engine.evaluate."""
        assert self.evaluation is not None
        window, evaluation = window_of(call.options["transformer_options"]), self.evaluation
        pass_ = self._pass(call, evaluation)
        if self.observer:
            self.observer.check(pass_, window)
        if pass_ is None:
            outputs = call.run(call.conds)
            self.unnamed = call.conds, outputs
            return outputs
        network = HostNetwork(
            call, self.features, self.settings.controller.reference_only and self.settings.difference is not None
        )
        outcome = self._region(window).evaluate(pass_, network)
        if network.answered or evaluation.ordinal in self.answered:
            self._make_way()
        self._record(outcome, pass_)
        return outcome.outputs

    def network_call(self, call: ModelCall) -> torch.Tensor:
        """One batch through the network: denoised, as the host has it."""
        request = call.options.get(REQUEST_KEY)
        run = call.run if request is None else lambda: request.serve(call)
        output, ran = self.watch.call(run) if self.watch else (run(), True)
        with self.counting:
            self._count(call, request, ran)
        return output

    def _count(self, call: ModelCall, request: Any, ran: bool) -> None:
        """A batch entered the network, or was answered in its place."""
        if self.record and self.evaluation:
            if ran or request is None or request.kinds:
                self.record.rows += call.x.shape[0]
            else:
                self.answered.add(self.evaluation.ordinal)

    def close(self) -> None:
        """End the run: drop every tensor, finish the report."""
        if self.watch:
            self.watch.close()
        self._close_evaluation()
        reuses = self._close_features(self.features) if self.features else False
        self._close_errors()
        if self.observer:
            self.observer.closed()
        if self.answered and messages.EASYCACHE not in self.report.notes:
            self.report.note(messages.answered_elsewhere(len(self.answered), len(self.report.evaluations)))
        elif not self._lost:
            self._explain(reuses)
        elif messages.UNKNOWN_REGION not in self.report.notes:
            self.report.note(messages.NO_REFERENCE)
        self.report.seconds = time.perf_counter() - self.started
        self.regions, self.features, self.observer, self.walk = {}, None, None, None
        self.x = self.unnamed = self.stride = self.watch = None
        self.extras.clear()

    def _context(self) -> RunContext:
        setup, settings, sampling = self.setup, self.settings, self.setup.model_sampling
        return RunContext(
            sampling.percent_to_sigma,
            self._solver(),
            setup.sigmas,
            late=is_compiled(setup.guider.model_patcher),
            predicts=settings.output is not None,
            estimates=settings.difference is not None,
            reuses=settings.reuse is not None,
        )

    def _solver(self) -> Solver:
        """What is known of the sampler, with what was learnt on this model."""
        solver = self.setup.solver or Solver()
        adaptive = isinstance(self.settings.steps, AdaptiveSettings)
        return replace(solver, law=law_of(self.setup, self.report)) if adaptive else solver

    def _walk(self) -> Walk | None:
        """What watches a sampler that counts as the one it wraps, None for others."""
        if not (self.setup.wrapped and self.settings.output):
            return None
        self.report.note(messages.wraps(self.setup.sampler_name, sampler_name(self.setup.wrapped)))
        return Walk(self.context.solver, self.setup.sigmas)

    def _stand_down(self) -> None:
        """Compute everything from here on."""
        if self.features:
            self.features.close()
        self.settings = replace(self.settings, output=None, difference=None, reuse=None)
        self.context, self.regions, self.features = self._context(), {}, None
        self.walk = self.stride = None

    def _make_way(self) -> None:
        """Another node's cache answered at this evaluation: two of them would each build on what the other made up."""
        assert self.evaluation is not None
        if not self.answered - {self.evaluation.ordinal}:
            self._stand_down()
        self.answered.add(self.evaluation.ordinal)

    def _forget(self) -> None:
        """The latent is another one than it should be: what was known of it is not."""
        self.report.note(messages.LATENT_MOVED)
        for engine in self.regions.values():
            engine.reset()
        if self.features:
            self.features.forget()

    def _find_positive(self, denoised: torch.Tensor) -> None:
        """Where no branch is known to be the positive one, it is that which the guider gives the largest share in what
        it made, `denoised` [batch, ...]."""
        unnamed, self.unnamed = self.unnamed, None
        if unnamed is None or unnamed[1][0].shape != denoised.shape:
            return
        conds, outputs = unnamed
        assert self.evaluation is not None
        active = active_branches(conds, self.evaluation.sigma)
        found = shares(denoised, [outputs[i] for i in active])
        if found:
            self.positive = uuids(conds[active[found.index(max(found))]])

    def _features(self) -> FeaturePass | None:
        """What reuses features in this run, None when nothing does."""
        reuse, longest = self.settings.reuse, self.settings.controller.longest_reuse
        if reuse is None:
            return None
        if longest is not None:
            reuse = reuse.within(longest + 1)
        if compiles(self.setup.guider.model_patcher.load_device) and not tolerates_changes():
            self.report.note(messages.COMPILER_OFF)
        return FeaturePass(reuse, self.setup.guider.model_patcher, self.setup.model_sampling.percent_to_sigma)

    def _sigma(self, timestep: torch.Tensor) -> float:
        """The sigma as a float, without waiting for the device where the sampler's next one is known."""
        following = self.clock.ordinal + 1
        if self.setup.solver and self.setup.solver.walks_grid and following < len(self.clock.grid):
            return self.clock.grid[following]
        return float(timestep.flatten()[0])

    def _pass(self, call: BranchesCall, evaluation: Evaluation) -> Pass | None:
        """The pass of an evaluation, None where the branch that others are estimated from is not known."""
        reference = reference_branch(call.conds, self.positive)
        if reference is None:
            return None
        active = active_branches(call.conds, evaluation.sigma)
        parts = self.setup.parts if call.x.shape[-1] == sum(self.setup.parts) else ()  # other in a context window
        space = self._space(len(active))(self.setup.model_sampling, call.timestep, call.x, parts)
        same = fingerprint(call.conds, evaluation.sigma, call.x)
        return Pass(evaluation, call.conds, reference, active, call.x, space, same)

    def _space(self, branches: int) -> type[OutputSpace]:
        """What signals of an evaluation of so many branches are made of."""
        if self.settings.controller.holds_slope:
            return SlopeSpace
        return DenoisedSpace if self.context.solver.noise and branches == 1 else OutputSpace

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
            whole = computed >= self.asked > 0 and record.ordinal not in self.answered
            if whole and not actions & {Action.ESTIMATE, Action.PREDICT}:
                self.rows_each = computed / self.asked  # more than one where other nodes run passes, or tiles, beside
            record.rows_full = max(round(self.asked * self.rows_each), computed)
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
                self.report.note(messages.features_not_reused(self.probes > 0, self.setup.steps))
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
        """True when nothing that was sampled could be told apart, which explains everything else."""
        return bool(self.report.evaluations) and not (self.regions or self.answered)

    def _explain(self, reuses: bool) -> None:
        """Say why nothing was skipped, if nothing was. reuses: features had room."""
        settings, evaluations = self.settings, [r.actions for r in self.report.evaluations]
        steps = self.setup.steps
        guided = any(len(actions) > 1 for actions in evaluations)
        if any(engine.guidance.lost for engine in self.regions.values()):
            self.report.note(messages.GUIDANCE_UNKNOWN)
        if settings.output and any(engine.crowded for engine in self.regions.values()):
            self.report.note(messages.CROWDED)
        if settings.difference and not guided:
            self.report.note(messages.NO_UNCOND)
        if settings.output and guided and self.context.solver.noise:
            self.report.note(messages.adds_noise_guided(self.setup.sampler_name))
        able = settings.output or reuses or (settings.difference and guided)
        skipped = any({*actions.values()} - {Action.COMPUTE.value} for actions in evaluations)
        skipped |= self.report.totals()["cost"] < 1.0  # in some windows
        if (
            settings.found
            and settings.output
            and settings.controller.uses_errors
            and self.context.solver.corrects
            and messages.NO_STEPS < steps <= messages.FEW_STEPS
        ):
            predicted = sum({*actions.values()} == {Action.PREDICT.value} for actions in evaluations)
            if predicted < LITTLE * len(evaluations):
                self.report.note(messages.policy_would_help(POLICY_PICTURES))
        if able and not skipped:
            may_help = settings.controller.probes and not (self.context.solver.corrects or reuses)
            self.report.note(messages.nothing_skipped(settings.controller.uses_errors, steps, may_help))


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
