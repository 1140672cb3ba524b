"""Puts settings and wrappers on a clone of a MODEL, and finds what its last run reported.

Here the host's positional arguments get names; `model_call` hands them back. No other file counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ...fastercache_core.settings import CacheSettings, combined
from .compatibility import RunSetup
from .compiler import nothing_repeated
from .conditioning import step_hooks
from .learning import learn
from .model_call import BranchesCall, ModelCall
from .reports import ReportBox
from .run import CacheRun, RunObserver

SETTINGS_KEY = "fastercache"
RUN_KEY = "fastercache_run"
BOX_KEY = "fastercache_report"
OBSERVER_KEY = "fastercache_observer"
MASK, CALLBACK = 4, 5  # their places among the arguments of OUTER_SAMPLE


def attach(model: Any, settings: CacheSettings, node_id: str | None = None, keeps: bool = False) -> Any:
    """Return a clone of `model` (ModelPatcher) that samples under `settings`, with what is on it already.

    See `combined`; keeps: of what both speak of, what is on the model counts.
    """
    there = model.model_options["transformer_options"].get(SETTINGS_KEY)
    if there:
        settings = combined(settings, there) if keeps else combined(there, settings)
    patched = _wrapped(model, settings)
    patched.set_attachments(BOX_KEY, ReportBox(node_id, model.get_attachment(BOX_KEY)))
    return patched


def observed(model: Any, settings: CacheSettings, observer: RunObserver) -> Any:
    """Return a clone of `model` (ModelPatcher) whose runs `observer` looks at, and that reports nothing."""
    patched = _wrapped(model, settings)
    patched.model_options["transformer_options"][OBSERVER_KEY] = observer
    patched.remove_attachments(BOX_KEY)
    return patched


def last_report(model: Any) -> dict[str, Any] | None:
    """The report of the last run of a MODEL, or None when it was never sampled or not patched."""
    box = model.get_attachment(BOX_KEY)
    return box.report if box else None


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """OUTER_SAMPLE: one run. args: noise, latent_image, sampler, sigmas, ..."""
    guider, options = executor.class_obj, executor.class_obj.model_options
    settings = options["transformer_options"][SETTINGS_KEY]
    observer = options["transformer_options"].get(OBSERVER_KEY)
    first, *others = shapes = kwargs.get("latent_shapes") or [args[0].shape]  # of packed latents
    parts = tuple(math.prod(shape[1:]) for shape in shapes) if others else ()
    run = CacheRun(settings, RunSetup(guider, args[2], tuple(args[3].tolist()), tuple(first), parts), observer)
    in_full = _in_full(executor, args, kwargs) if settings.learn and observer is None else None
    try:
        latent = _under(run, executor, *args, **kwargs)
        if in_full:
            learn(run.setup, run.report, latent, in_full if args[MASK] is None else None)
        return latent
    finally:
        if observer is None:
            (guider.model_patcher.get_attachment(BOX_KEY) or ReportBox()).deliver(run.report)


def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PREDICT_NOISE: one evaluation. args: x, timestep, model_options, seed."""
    run = _run_of(args[2] if len(args) > 2 else kwargs["model_options"])
    if run is None:
        return executor(*args, **kwargs)
    run.begin(args[0], args[1])
    denoised = executor(*args, **kwargs)
    run.done(args[0], denoised)
    return denoised


def calc_cond_batch(executor: Any, *args: Any) -> list[torch.Tensor]:
    """CALC_COND_BATCH: all branches of one evaluation, or an extra pass of another node.

    args: model, conds, x, timestep, model_options.
    """
    call = BranchesCall(executor, *args)
    run = _run_of(call.options)
    if run is None or run.evaluation is None:
        return executor(*args)
    if not run.first_pass(call):
        return run.extra(call)
    step_hooks(call.model, call.conds, run.evaluation.sigma, call.timestep, call.options)
    return run.evaluate(call)


def apply_model(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """APPLY_MODEL: one batch through the network. args: x, t, c_concat, c_crossattn, control, options."""
    run = _run_of({"transformer_options": args[5]}) if len(args) > 5 else None
    if run is None:
        return executor(*args, **kwargs)
    x, t, c_concat, c_crossattn, control, options, *rest = args
    return run.network_call(ModelCall(executor, x, t, c_concat, c_crossattn, control, options, tuple(rest), kwargs))


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}


def _wrapped(model: Any, settings: CacheSettings) -> Any:
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options.pop(OBSERVER_KEY, None)
    options[SETTINGS_KEY] = settings
    for kind, wrapper in WRAPPERS.items():
        patched.remove_wrappers_with_key(kind, SETTINGS_KEY)
        patched.add_wrapper_with_key(kind, SETTINGS_KEY, wrapper)
    return patched


def _under(run: CacheRun, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """One sampling, with `run` deciding what is computed."""
    guider, options = executor.class_obj, executor.class_obj.model_options
    try:
        guider.model_options = comfy.model_patcher.create_model_options_clone(options)
        guider.model_options["transformer_options"][RUN_KEY] = run
        _go_first(guider.model_options["transformer_options"].get("wrappers", {}))
        with nothing_repeated() if run.features else nullcontext():
            return executor(*args, **kwargs)
    finally:
        guider.model_options = options
        run.close()


def _go_first(wrappers: dict[str, dict[str, Any]]) -> None:
    """Be asked before all other nodes for every evaluation, so that none is missed that another cache answers."""
    ours = wrappers.get(WrappersMP.PREDICT_NOISE, {})
    if SETTINGS_KEY in ours:
        wrappers[WrappersMP.PREDICT_NOISE] = {SETTINGS_KEY: ours[SETTINGS_KEY], **ours}


def _in_full(executor: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """What samples once more with nothing skipped. It shows nothing of itself, but can be interrupted."""
    guider = executor.class_obj
    conds = {name: [{**cond} for cond in conds] for name, conds in guider.conds.items()}  # sampling changes its own
    stop = lambda *_: comfy.model_management.throw_exception_if_processing_interrupted()

    def sample() -> torch.Tensor:
        guider.conds = conds
        return executor(*args[:CALLBACK], stop, *args[CALLBACK + 1 :], **kwargs)

    return sample


def _run_of(options: dict[str, Any]) -> CacheRun | None:
    return options.get("transformer_options", {}).get(RUN_KEY)
