"""Whether a plan serves this run: FRDiff's mixing with its sampler, a policy with its settings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import comfy.samplers

from ...fastercache_core import messages
from ...fastercache_core.actions import Action, Step
from ...fastercache_core.calibration.policy import Policy, PolicyError, Setup
from ...fastercache_core.controllers.planned import CONSTANT, MixSettings, PolicySettings, StepsSettings
from ...fastercache_core.settings import CacheSettings
from .compatibility import RunSetup, sampler_name
from .fingerprint import other_size, size_of
from .found import kept

# At so many times its own cfg a policy's weights still were no worse than forecasts fitted during the run.
SAME_CFG = (0.5, 1.1)
# Moved to fewer steps than this share of its own, or than so many, a policy was no longer clearly better than plain
# fewer steps.
FEW_SHARE, FEW = 0.75, 20
# Samplers that use the negative pass by itself (CFG++), and the highest cfg at which FRDiff did them no harm.
CFG_PP, CFG_PP_MOST = "_cfg_pp", 1.5


def planned(settings: CacheSettings, setup: RunSetup) -> tuple[CacheSettings, list[str]]:
    """`settings` with a plan that serves a run, without features where it takes none, and the notes."""
    if setup.solver is None or not setup.solver.known:
        return settings, []
    if isinstance(settings.steps, MixSettings):
        return _mixing(settings, settings.steps, setup)
    if settings.found and settings.output:
        return _found(settings, setup)
    if isinstance(settings.controller, PolicySettings):
        steps, notes = steps_of(settings.controller.policy, setup)
        reuse = settings.reuse if any(step.action.reuses for _, step in steps) else None
        weighed = with_weights(settings) if any(step.weighs for _, step in steps) else settings
        return replace(weighed, controller=StepsSettings(steps), reuse=reuse), notes
    return settings, []


def _found(settings: CacheSettings, setup: RunSetup) -> tuple[CacheSettings, list[str]]:
    """`settings` with the policy that Auto-FR found for exactly this run, where there is one, and the notes."""
    try:
        found = kept(setup)
    except (PolicyError, OSError) as error:
        return settings, [messages.found_unreadable(error)]
    if found is None:
        return settings, []
    policy, when = found
    steps = StepsSettings(list(zip(policy.sigmas, policy.steps, strict=True)))
    date = time.strftime("%Y-%m-%d", time.localtime(when))
    note = messages.uses_found(date, policy.points[policy.chosen].actions(), policy.error)
    return replace(with_weights(settings), controller=steps, reuse=None), [note]


def with_weights(settings: CacheSettings) -> CacheSettings:
    """`settings` that predict by the weights of their steps."""
    output, difference = settings.output, settings.difference
    return replace(
        settings,
        output=output and replace(output, forecast="weighed"),
        difference=difference and replace(difference, forecast="weighed"),
    )


def nothing_to_gain(settings: MixSettings, setup: RunSetup) -> str | None:
    """Why FRDiff was farther from full sampling than fewer steps with this sampler, None where it was not.

    Measured sampler by sampler, docs/frdiff.md.
    """
    solver, name, cfg = setup.solver, setup.sampler_name, setup.cfg
    if solver is None:
        return None
    if name.endswith(CFG_PP) and solver.order > 1:
        return messages.frdiff_cfg_pp_order(name)
    if name.endswith(CFG_PP) and cfg is not None and cfg > CFG_PP_MOST:
        return messages.frdiff_cfg_pp_cfg(name, cfg)
    if settings.mixing == "measured" and solver.order > 1 and solver.calls == 1 and not solver.noise:
        return messages.frdiff_multistep(name)
    return None


def steps_of(policy: Policy, setup: RunSetup) -> tuple[list[tuple[float, Step]], list[str]]:
    """(sigma, Step) of every evaluation of a run under `policy`, and notes on where the run is not what it was found
    for."""
    evaluations, found, solver = setup.sigmas[:-1], policy.setup, setup.solver
    notes = list(_other_settings(found, setup))
    if not _weights_serve(found, setup):
        policy = policy.without_weights()
    if solver and solver.calls == 1:
        moved = policy.for_sigmas(evaluations)
        if moved is None:
            return [], [*notes, messages.POLICY_NOT_MOVED]
        notes += [] if moved is policy else [_other_grid(found, len(evaluations))]
        policy = moved
    elif found.steps != len(evaluations):
        # What lies between the sigmas of a sampler with more calls a step is known from calibration only.
        return [], notes
    if solver and solver.order > 1 and any(map(_uncorrected, policy.steps)):
        return [], [*notes, messages.builds_on_differences(setup.sampler_name)]
    return list(zip(policy.sigmas, policy.steps, strict=True)), notes


def _uncorrected(step: Step) -> bool:
    return step.action in (Action.PREDICT, Action.MIX) and not step.weighs


def _mixing(settings: CacheSettings, mixing: MixSettings, setup: RunSetup) -> tuple[CacheSettings, list[str]]:
    reason = nothing_to_gain(mixing, setup)
    if reason:
        return replace(settings.with_steps(StepsSettings(())), reuse=None), [reason]
    holds = settings.output is not None and CONSTANT.get(mixing.mixing) == 0.0
    return (replace(settings, reuse=None) if holds else settings), []


def _other_settings(found: Setup, setup: RunSetup) -> Iterator[str]:
    """Sentences on how a run differs from the Setup `found`, its evaluations aside."""
    if _other_cfg(found, setup) and setup.cfg is not None:
        yield messages.other_cfg(found.cfg, setup.cfg, _weights_serve(found, setup))
    if not _is_sampler(found.sampler, setup.sampler_name):
        yield messages.other_sampler(found.sampler, setup.sampler_name)
    size = size_of(setup.shape)
    if other_size(found.resolution, size):
        yield messages.other_size(found.resolution, size)


def _other_grid(found: Setup, steps: int) -> str:
    if steps == found.steps:
        return messages.other_sigmas(found.scheduler)
    few = steps < max(FEW_SHARE * found.steps, min(FEW, found.steps))
    return messages.other_grid(found.steps, steps, few)


def _other_cfg(found: Setup, setup: RunSetup) -> bool:
    return setup.cfg is not None and not math.isclose(setup.cfg, found.cfg, abs_tol=1e-6)


def _weights_serve(found: Setup, setup: RunSetup) -> bool:
    low, high = (share * found.cfg for share in SAME_CFG)
    return not _other_cfg(found, setup) or (setup.cfg is not None and low <= setup.cfg <= high)


def _is_sampler(name: str, function: str) -> bool:
    """True when the host's sampler `name` (one of a KSampler's choices) runs `function`."""
    known = name in comfy.samplers.SAMPLER_NAMES
    return known and sampler_name(comfy.samplers.sampler_object(name)) == function
