"""Puts settings and wrappers on a clone of a MODEL, and finds what its last run reported."""
import logging

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ...fastercache_core.report import summary_line
from .announce import announce
from .branches import step_hooks
from .run import CacheRun

SETTINGS_KEY = "fastercache"
RUN_KEY = "fastercache_run"
BOX_KEY = "fastercache_report"


class ReportBox:
    """Holds the last run's report, plain JSON data, for whoever has the MODEL."""

    def __init__(self, node_id=None):
        self.node_id = node_id
        self.report = None


def attach(model, settings, node_id=None):
    """Return a clone of `model` (ModelPatcher) that samples under `settings` (CacheSettings).

    A second cache node on the same model replaces the first one's settings.
    """
    patched = model.clone()
    patched.model_options["transformer_options"][SETTINGS_KEY] = settings
    patched.set_attachments(BOX_KEY, ReportBox(node_id))
    for kind, wrapper in WRAPPERS.items():
        patched.remove_wrappers_with_key(kind, SETTINGS_KEY)
        patched.add_wrapper_with_key(kind, SETTINGS_KEY, wrapper)
    return patched


def last_report(model):
    """The report of the last run of a MODEL, or None when it was never sampled or not patched."""
    box = model.get_attachment(BOX_KEY)
    return box.report if box else None


def outer_sample(executor, *args, **kwargs):
    """OUTER_SAMPLE: one run. args: noise, latent_image, sampler, sigmas, ..."""
    guider = executor.class_obj
    options = guider.model_options
    settings = options["transformer_options"][SETTINGS_KEY]
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    shape = (kwargs.get("latent_shapes") or [args[0].shape])[0]  # of packed latents the first
    run = CacheRun(settings, guider, args[2], args[3], shape)
    guider.model_options["transformer_options"][RUN_KEY] = run
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = options
        run.close()
        _deliver(guider.model_patcher.get_attachment(BOX_KEY), run.report.as_dict())


def predict_noise(executor, *args, **kwargs):
    """PREDICT_NOISE: one evaluation. args: x, timestep, model_options, seed."""
    run = _run_of(args[2] if len(args) > 2 else kwargs["model_options"])
    if run is not None:
        run.begin(args[1])
    return executor(*args, **kwargs)


def calc_cond_batch(executor, model, conds, x, timestep, model_options):
    """CALC_COND_BATCH: all branches of one evaluation, or an extra pass of another node."""
    run = _run_of(model_options)
    if run is None or not run.first_pass(model_options):
        return executor(model, conds, x, timestep, model_options)

    def run_branches(chosen):
        return executor(model, chosen, x, timestep, model_options)

    step_hooks(model, conds, run.evaluation.sigma, timestep, model_options)
    return run.evaluate(run_branches, conds, x, timestep, model_options)


def apply_model(executor, *args, **kwargs):
    """APPLY_MODEL: one batch through the network. args: x, t, c_concat, c_crossattn, control, options."""
    run = _run_of({"transformer_options": args[5]})
    if run is None:
        return executor(*args, **kwargs)
    return run.apply_model(executor, args, kwargs)


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}


def _run_of(model_options):
    return model_options.get("transformer_options", {}).get(RUN_KEY)


def _deliver(box, report):
    logging.info(summary_line(report))
    if box is not None:
        box.report = report
        announce(box.node_id, report)
