"""What cannot work with what, decided before sampling starts: every refusal has its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...fastercache_core import messages
from ...fastercache_core.clock import knows_grid
from ...fastercache_core.features.reuse import ReuseSettings
from ...fastercache_core.settings import CacheSettings
from ...fastercache_core.solvers import NOISY, UNKNOWN, Solver, find_solver
from .families import available, find_family
from .model_call import uncompiled


@dataclass(frozen=True)
class RunSetup:
    """What a run is, in the host's terms: guider, SAMPLER, sigmas, and shape of the latent [batch, channels, ...].

    parts: how many elements each of several latents has that are packed into one; none where it is one.
    """

    guider: Any
    sampler: Any
    sigmas: tuple[float, ...]
    shape: tuple[int, ...]
    parts: tuple[int, ...] = ()

    @property
    def sampler_name(self) -> str:
        """Name of the sampler's function; its class name where it has none."""
        return sampler_name(self.sampler)

    @cached_property
    def solver(self) -> Solver | None:
        """What is known of the sampler, or of the one that it wraps; None where its steps depend on the network."""
        solver = solver_of(self.sampler)
        if solver and not knows_grid(self.sigmas):
            return UNKNOWN
        if solver and solver.noise and solver.known and self.alone:
            return replace(solver, law=NOISY)
        return solver_of(self.wrapped) if self.wrapped else solver

    @cached_property
    def wrapped(self) -> Any | None:
        """The SAMPLER that an unknown one hands its work to, if its steps are known well enough to be watched."""
        if solver_of(self.sampler) is not UNKNOWN or not knows_grid(self.sigmas):
            return None
        inner = wrapped_sampler(self.sampler)
        solver = solver_of(inner) if inner else None
        return inner if solver and solver.corrects else None

    @property
    def cfg(self) -> float | None:
        """The guider's cfg, None where it has none."""
        cfg = getattr(self.guider, "cfg", None)
        return cfg if isinstance(cfg, (int, float)) else None

    @property
    def alone(self) -> bool:
        """True where nothing but the positive conditioning is expected to run."""
        return len(self.guider.conds) < 2 or self.cfg == 1.0

    @property
    def steps(self) -> int:
        """How many steps the sampler takes."""
        return len(self.sigmas) - 1

    @property
    def model_sampling(self) -> Any:
        """The host's object of that name."""
        return self.guider.model_patcher.get_model_object("model_sampling")


def sampler_name(sampler: Any) -> str:
    """Name of a SAMPLER object's function; its class name where it has none."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)


def solver_of(sampler: Any) -> Solver | None:
    """What is known of a SAMPLER object's own function, see `find_solver`."""
    return find_solver(sampler_name(sampler), options_of(sampler).get("s_churn", 0.0))


def options_of(sampler: Any) -> dict[str, Any]:
    """What a SAMPLER object's function gets beside its usual arguments."""
    return getattr(sampler, "extra_options", {})


def wrapped_sampler(sampler: Any) -> Any | None:
    """The one SAMPLER object that another one holds, in its options or in its function's closure; else None."""
    cells = getattr(getattr(sampler, "sampler_function", None), "__closure__", None) or ()
    held = [*options_of(sampler).values(), *(cell.cell_contents for cell in cells)]
    inner = [value for value in held if hasattr(value, "sampler_function")]
    return inner[0] if len(inner) == 1 else None


def compatible(settings: CacheSettings, setup: RunSetup) -> tuple[CacheSettings, list[str]]:
    """`settings` without what cannot work in a run, and the reasons."""
    reasons = refusals(settings, setup)
    notes = list(dict.fromkeys(reasons.values()))
    off: Any = dict.fromkeys(reasons)
    settings = replace(settings, **off)
    if not (settings.difference or settings.reuse or settings.output):
        notes.append(messages.NOTHING_ON)
    if setup.solver:
        settings, more = _served(settings, setup.solver, setup.sampler_name)
        notes += more
    return settings, notes


def refusals(settings: CacheSettings, setup: RunSetup) -> dict[str, str]:
    """Parts of `settings` (names of fields) that must not run, with the reason of each."""
    wanted = [name for name in ("output", "difference", "reuse") if getattr(settings, name) is not None]
    reason = _no_caching(settings, setup)
    if reason:
        return dict.fromkeys(wanted, reason)
    corrected = bool(setup.solver and setup.solver.corrects) and (
        settings.controller.corrects or settings.controller.weighs
    )
    checks: dict[str, Callable[[], str | None]] = {
        "output": lambda: _no_prediction(settings, setup, corrected),
        "difference": lambda: _no_estimate(settings, setup),
        "reuse": lambda: _no_features(settings.reuse, setup),
    }
    return {name: reason for name in wanted if (reason := checks[name]())}


def is_compiled(model: Any) -> bool:
    """True when torch.compile is at work in a MODEL (ModelPatcher), by the host's node or as another node's patch."""
    wrapped = model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get("torch.compile")
    return bool(wrapped) or any(hasattr(patch, "_orig_mod") for patch in model.object_patches.values())


def on_several_devices(model: Any) -> bool:
    """True when the host runs the branches of a MODEL (ModelPatcher) on several devices at once, in threads.

    Each device has a network of its own. The host puts them among the model's options only when sampling has begun.
    """
    return bool(model.get_additional_models_with_key("multigpu"))


def _no_caching(settings: CacheSettings, setup: RunSetup) -> str | None:
    transformer_options = setup.guider.model_options.get("transformer_options", {})
    if "easycache" in transformer_options:
        return messages.EASYCACHE
    patches = transformer_options.get("patches", {}).get("attn1_output_patch", [])
    if any("NAGuidance" in getattr(patch, "__qualname__", "") for patch in patches):
        return messages.NAG
    if setup.sigmas[-1] > setup.sigmas[0]:
        return messages.NOISE_RISES
    if setup.solver is None:
        return messages.sampler_adapts(setup.sampler_name)
    features = settings.controller.probes and settings.reuse and not on_several_devices(setup.guider.model_patcher)
    if setup.solver.known or features:
        return None
    return messages.unknown_sampler(setup.sampler_name) if knows_grid(setup.sigmas) else messages.NO_SIGMAS


def _no_prediction(settings: CacheSettings, setup: RunSetup, corrected: bool) -> str | None:
    solver, name = setup.solver, setup.sampler_name
    if solver and not solver.known:
        return _not_known(setup)
    if solver and solver.noise:
        return None if solver.calls == 1 and settings.controller.uses_errors else messages.adds_noise(name)
    if solver and (solver.calls > 1 or solver.order > 1) and not corrected:
        return messages.builds_on_differences(name)
    return None


def _no_estimate(settings: CacheSettings, setup: RunSetup) -> str | None:
    solver = setup.solver
    if solver and not solver.known:
        return _not_known(setup)
    if solver and settings.controller.probes and solver.extrapolates and solver.order > 2:
        return messages.extrapolates(setup.sampler_name)
    return None


def _not_known(setup: RunSetup) -> str:
    return messages.unknown_reuses(setup.sampler_name) if knows_grid(setup.sigmas) else messages.NO_SIGMAS


def _no_features(reuse: ReuseSettings | None, setup: RunSetup) -> str | None:
    if on_several_devices(setup.guider.model_patcher):
        return messages.SEVERAL_DEVICES
    family = find_family(uncompiled(setup.guider.model_patcher.model.diffusion_model))
    kinds = reuse.intervals if reuse else {}
    return None if available(family, kinds)[0] else messages.no_feature_kinds(family.name, list(kinds))


def _served(settings: CacheSettings, solver: Solver, name: str) -> tuple[CacheSettings, list[str]]:
    """`settings` as far as the solver serves them, with features only where they help, and the notes."""
    controller, note = settings.controller.served(solver, name)
    settings = replace(settings, controller=controller)
    notes = [note] if note and (settings.difference or settings.output or settings.reuse) else []
    if settings.output and solver.noise:
        settings = replace(settings, output=replace(settings.output, forecast="hedged"))
    if not (controller.corrects and solver.corrects):
        return settings, notes
    if settings.difference:
        # Where only the negative pass is estimated, every second time at most, the fitted forecast was closer.
        settings = replace(settings, difference=replace(settings.difference, forecast="hedged"))
    if settings.reuse:
        settings = replace(settings, reuse=None)
        notes.append(messages.features_not_needed(name))
    return settings, notes
