"""The engine: what every evaluation of one latent region does. Decide, act, observe, correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .actions import Action, Step
from .corrector import Corrector
from .features.probe import Probe
from .guidance import Guidance
from .protocols import FeatureUse, Network, Observer, Pass, Result, RunContext, Signals
from .settings import CacheSettings
from .signal import Signal, rms, worst


@dataclass(frozen=True)
class Outcome:
    """What an evaluation did: its action, that of every active branch, the denoised latent of every branch, and how
    many rows a probe ran beside."""

    action: Action
    actions: dict[int, Action]
    outputs: list[Tensor]
    probe_rows: int = 0


class Engine:
    """Runs the evaluations of one region: a run has one, or one per context window of a long video."""

    def __init__(self, settings: CacheSettings, context: RunContext, observer: Observer | None = None) -> None:
        self.settings, self.context, self.observer = settings, context, observer
        self.controller = settings.controller.controller(context)
        self.output = settings.output.signal() if settings.output else None
        self.differences: dict[int, Signal] = {}
        self.estimates: dict[int, Signal] = {}  # the same as CFG-Cache of another node carries them forward
        self.correctors: dict[int, Corrector] = {}
        self.corrects = settings.controller.corrects and context.solver.corrects
        self.probe = Probe() if settings.controller.probes and context.reuses else None
        self.guidance = Guidance(context.late)
        self.watches = settings.controller.uses_errors or self.probe is not None
        self.made: tuple[Pass, Outcome] | None = None  # until the guider has made one latent of it
        self.crowded = False  # other nodes ran as many branches again: a predicted step saves little and harms them all
        self.fingerprint: Any = None
        self.used_at, self.computed_at = -1, -1
        self.before: list[Tensor] = []  # signals of the last computed evaluation, until the first probe

    def evaluate(self, pass_: Pass, network: Network) -> Outcome:
        """Denoised latents of all branches of a pass, by running `network` for as few as the controller says."""
        self._forget_if_changed(pass_)
        if self.observer:
            network = self.observer.before(pass_, network)
        step = self._decide(pass_)
        outcome = self._act(step, pass_, network)
        self._observe(outcome, pass_)
        outcome = self._correct(step, outcome, pass_)
        self.made = (pass_, outcome) if pass_.has_reference else None
        return outcome

    def guided(self, denoised: Tensor, extras: Sequence[Tensor] = ()) -> None:
        """The guider made `denoised` of the outputs of the last evaluation, and of `extras` that other nodes computed;
        all [batch, ...]."""
        made, self.made = self.made, None
        if made is None:
            return
        pass_, outcome = made
        self.crowded = len(extras) >= len(pass_.active)
        if not self.watches:
            return
        outputs, computed = outcome.outputs, outcome.action is Action.COMPUTE
        others = {i: outputs[i] for i in pass_.others}
        self.guidance.measure(denoised, outputs[pass_.reference], others, extras, computed)

    def reset(self) -> None:
        """Forget everything, so that the next evaluation is computed."""
        for signal in self._signals():
            signal.clear()
        if self.probe:
            self.probe.reset()
        self.before = []
        self.controller.reset()
        self.correctors.clear()
        self.computed_at = -1

    def finish(self) -> float | None:
        """The run is over: see Controller."""
        weights = lambda: self._weights([*self.differences])
        return self.controller.finish(Signals(self.output, [*self.differences.values()], self.probe, weights))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        signals = [t for signal in self._signals() for t in signal.tensors()]
        return self.before + signals + [t for corrector in self.correctors.values() for t in corrector.tensors()]

    def _forget_if_changed(self, pass_: Pass) -> None:
        if self.fingerprint is not None and pass_.fingerprint != self.fingerprint:
            self.reset()
        self.fingerprint, self.used_at = pass_.fingerprint, pass_.evaluation.ordinal

    # Decide

    def _decide(self, pass_: Pass) -> Step:
        if not pass_.has_reference:
            return Step(Action.COMPUTE)
        if self.settings.controller.uses_errors and self.guidance.rose:
            return Step(Action.COMPUTE)
        step = self.controller.choose(pass_.evaluation, self._known(pass_))
        return Step(Action.COMPUTE) if step.action is Action.PREDICT and self.crowded else step

    def _known(self, pass_: Pass) -> Signals:
        if not self.settings.difference:  # other branches cannot follow from a predicted one
            output = None if pass_.others else self.output
            return Signals(output, [], self.probe, lambda: self._weights([]))
        others = pass_.others
        differences = [self.differences.get(i) for i in others]
        estimates = [self.estimates.get(i) for i in others] if self.settings.guided else []
        return Signals(self.output, differences, self.probe, lambda: self._weights(others), estimates)

    def _weights(self, others: Sequence[int]) -> list[float]:
        weights = self.guidance.weights
        return [weights.output, *map(weights.of, others)]

    # Act

    def _act(self, step: Step, pass_: Pass, network: Network) -> Outcome:
        if step.action is Action.PREDICT:
            outputs = self._fill(self._with_weights(step, pass_, ()), pass_)
            return Outcome(Action.PREDICT, dict.fromkeys(pass_.active, Action.PREDICT), outputs)
        if step.action is Action.ESTIMATE:
            return self._estimate(step, pass_, network)
        if step.action is Action.COMPUTE and self._probe_is_due(pass_):
            return self._compute_and_probe(pass_, network)
        use = FeatureUse.REUSE if step.action.reuses else FeatureUse.STORE
        result = network.run(pass_, pass_.branches, use)
        if step.action is Action.MIX and result.reused:
            return self._mix(step, pass_, result)
        return _ran(pass_, result)

    def _estimate(self, step: Step, pass_: Pass, network: Network) -> Outcome:
        """The reference by the network, the others from it."""
        alone = [branch if i == pass_.reference else None for i, branch in enumerate(pass_.branches)]
        use = FeatureUse.REUSE if step.reuses else FeatureUse.STORE
        result = network.run(pass_, alone, use)
        cond = result.outputs[pass_.reference]
        outputs = self._fill(self._with_weights(step, pass_, result.outputs), pass_, cond)
        actions = dict.fromkeys(pass_.active, Action.ESTIMATE)
        actions[pass_.reference] = Action.REUSE if result.reused else Action.COMPUTE
        return Outcome(Action.ESTIMATE, actions, outputs)

    def _mix(self, step: Step, pass_: Pass, result: Result) -> Outcome:
        """Of what came with reused features and what is predicted (FRDiff's score mixing)."""
        predicted = self._fill(self._with_weights(step, pass_, result.outputs), pass_)
        outputs = [*result.outputs]
        for i in pass_.active:
            outputs[i] = torch.lerp(predicted[i], outputs[i], step.mix)
        return Outcome(Action.MIX, dict.fromkeys(pass_.active, Action.MIX), outputs)

    def _with_weights(self, step: Step, pass_: Pass, outputs: Sequence[Tensor]) -> Step:
        return self.observer.weigh(step, pass_, self._known(pass_), outputs) if self.observer else step

    def _fill(self, step: Step, pass_: Pass, cond: Tensor | None = None) -> list[Tensor]:
        """Denoised latents of all branches: the reference's is `cond`, or predicted, the others follow from it."""
        sigma, space = pass_.evaluation.sigma, pass_.space
        if cond is None:
            assert self.output is not None
            cond = space.denoised(self.output.predict(sigma, values=step.cond).to(pass_.x.dtype))
        guides = self.estimates if step.action is Action.ESTIMATE and self.settings.guided else self.differences
        # The host leaves inactive branches at zero.
        outputs = [cond if i in pass_.active else torch.zeros_like(cond) for i in range(len(pass_.branches))]
        for i in pass_.others:
            outputs[i] = guides[i].predict(sigma, cond, space.scale, step.difference)
        return outputs

    def _probe_is_due(self, pass_: Pass) -> bool:
        compares = pass_.has_reference and self.computed_at >= 0
        return bool(self.probe and compares and self.probe.due(pass_.evaluation))

    def _compute_and_probe(self, pass_: Pass, network: Network) -> Outcome:
        """Everything by the network, once more with features from the cache if there are any: their error shows."""
        assert self.probe is not None
        probed = network.run(pass_, pass_.branches, FeatureUse.PROBE)
        outcome = _ran(pass_, network.run(pass_, pass_.branches, FeatureUse.STORE))
        if probed.reused:
            error = self._error(probed.outputs, outcome.outputs, pass_)
            age = pass_.evaluation.ordinal - self.computed_at
            self.probe.observe(pass_.evaluation, error, age, probed.deep)
        return replace(outcome, probe_rows=probed.rows)

    def _error(self, outputs: Sequence[Tensor], true: Sequence[Tensor], pass_: Pass) -> Tensor:
        """Relative error of the latent's slope by denoised `outputs` in place of `true` ones, [batch]."""
        space, reference, weights = pass_.space, pass_.reference, self.guidance.weights
        error = rms(space.difference(outputs[reference], true[reference]), space.parts) * weights.output
        for i in pass_.others:
            change = (outputs[i] - outputs[reference]) - (true[i] - true[reference])
            error = error + rms(change / space.scale, space.parts) * weights.of(i)
        return worst(error * space.unit(pass_.x))

    # Observe

    def _observe(self, outcome: Outcome, pass_: Pass) -> None:
        """Learn from an evaluation at which everything was computed."""
        if self.observer:
            self.observer.after(pass_, outcome.action, outcome.outputs)
        if not pass_.has_reference:
            return
        self.controller.took(pass_.evaluation, outcome.action)
        if outcome.action is not Action.COMPUTE:
            return
        self.computed_at = pass_.evaluation.ordinal
        self._compare(outcome, pass_)
        sigma, space, cond = pass_.evaluation.sigma, pass_.space, outcome.outputs[pass_.reference]
        unit = self.controller.unit(pass_, cond)
        if self.output:
            self.output.observe(sigma, space.output(cond), unit, space.parts)
        if self.settings.difference:
            for i in pass_.others:
                for signal in self._differences(i):
                    signal.observe(sigma, space.difference(outcome.outputs[i], cond), unit, space.parts)

    def _compare(self, outcome: Outcome, pass_: Pass) -> None:
        """Tell the probe, before its first time, how far the outputs changed: it may not be worth while."""
        if self.probe is None or self.probe.error is not None:
            self.before = []
            return
        space, cond = pass_.space, outcome.outputs[pass_.reference]
        now = [space.output(cond), *(space.difference(outcome.outputs[i], cond) for i in pass_.others)]
        if len(self.before) == len(now):
            changes = [rms(a - b, space.parts) for a, b in zip(now, self.before, strict=True)]
            change = sum(w * change for w, change in zip(self._weights(pass_.others), changes, strict=True))
            self.probe.changed(pass_.evaluation, worst(change * space.unit(pass_.x)))
        self.before = now

    def _differences(self, index: int) -> list[Signal]:
        """The signals of a branch's difference to the reference."""
        kinds = ((self.differences, self.settings.difference), (self.estimates, self.settings.guided))
        for signals, settings in kinds:
            if settings and index not in signals:
                signals[index] = settings.signal(self.context.percent_to_sigma)
        return [signals[index] for signals, settings in kinds if settings]

    def _signals(self) -> list[Signal]:
        return [*([self.output] if self.output else []), *self.differences.values(), *self.estimates.values()]

    # Correct

    def _correct(self, step: Step, outcome: Outcome, pass_: Pass) -> Outcome:
        """What forecasts before this evaluation got wrong is taken back by what the sampler gets now."""
        if step.action is outcome.action is Action.COMPUTE:
            step = self._with_weights(step, pass_, outcome.outputs)
            if step.weighs:
                return replace(outcome, outputs=self._fill(step, pass_))
        if not (self.corrects and pass_.has_reference):
            return outcome
        shifts = self._shifts(outcome, pass_)
        outputs = [*outcome.outputs]
        for i in pass_.active:
            own = [shift for j in {pass_.reference, i} if (shift := shifts.get(j)) is not None]
            if own:
                outputs[i] = pass_.space.add(outputs[i], sum(own[1:], own[0]))
        return replace(outcome, outputs=outputs)

    def _shifts(self, outcome: Outcome, pass_: Pass) -> dict[int, Tensor | None]:
        """What to add to the signal of each branch."""
        evaluation, space, reference = pass_.evaluation, pass_.space, pass_.reference
        cond, shifts = outcome.outputs[reference], {}
        for i in (reference, *pass_.others):
            signal = self.output if i == reference else self.differences.get(i)
            corrector = self.correctors.setdefault(i, Corrector(self.context.solver))
            if signal and outcome.action is Action.COMPUTE:
                shifts[i] = corrector.computed(evaluation, signal.forecaster, space.scale)
            elif signal and i == reference and outcome.action is Action.ESTIMATE:
                shifts[i] = corrector.passed(evaluation, space.scale)
            elif signal:
                value = space.output(cond) if i == reference else space.difference(outcome.outputs[i], cond)
                shifts[i] = corrector.predicted(evaluation, value, space.scale)
        return shifts


def _ran(pass_: Pass, result: Result) -> Outcome:
    """The outcome of a run of all branches, some of which may have taken features from the cache."""
    actions = {i: Action.REUSE if i in result.reused else Action.COMPUTE for i in pass_.active}
    return Outcome(Action.REUSE if result.reused else Action.COMPUTE, actions, result.outputs)
