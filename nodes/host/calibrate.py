"""Calibration in the host: full runs that are recorded, and runs that fit a policy's weights.

Both sample as a KSampler does, with wrappers of their own on a clone of the model. Nothing of them
outlives the call but plain data.
"""
from collections import Counter
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from torch.utils.flop_counter import FlopCounterMode

from ...fastercache_core.calibration import DEPTH, Losses, Reference, find_points, fit, rms, take
from ...fastercache_core.clock import Clock
from ...fastercache_core.guidance import GuidanceSettings
from ...fastercache_core.jump import JumpSettings
from ...fastercache_core.mixing import mix
from ...fastercache_core.policy import Policy, Setup
from ...fastercache_core.settings import CacheSettings
from .attach import SETTINGS_KEY, WRAPPERS
from .branches import branch_is_active, branch_keys, reference_branch
from .features import Features
from .identity import model_fingerprint, size_of
from .output_space import OutputSpace
from .plans import REUSING, planned_reuse
from .refusals import refusals

KEY = "fastercache_calibration"
# Features are tried at so many evaluations after the one that computed them: each try is a pass.
REACH = 3


@dataclass(frozen=True)
class Sampling:
    """What a KSampler is told. latent: [batch, ...], as in LATENT["samples"]."""
    positive: list
    negative: list
    latent: torch.Tensor
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float = 1.0


class CalibrationError(ValueError):
    """Why this model or this sampling cannot be calibrated, in one sentence."""


class Recorder:
    """One full run, kept as `reference`."""

    def __init__(self, guidance_scale, progress):
        """progress: called without arguments after every evaluation."""
        self.reference = Reference(guidance_scale)
        self.progress = progress
        self.refused, self.guided = {}, False
        self.guider = self.clock = self.evaluation = self.outputs = self.features = None

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: the run starts. args: noise, latent_image, sampler, sigmas, ..."""
        self.guider, self.clock = executor.class_obj, Clock(args[3].tolist())
        wanted = CacheSettings("calibration", GuidanceSettings(), planned_reuse(), JumpSettings())
        self.refused = refusals(wanted, self.guider, args[2])
        if "guidance" in self.refused:
            raise CalibrationError(self.refused["guidance"])
        return executor(*args, **kwargs)

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL: one batch through the network. args: x, t, c_concat, c_crossattn, control, options."""
        if self.features is None:
            return executor(*args, **kwargs)
        keys = branch_keys(args[5], None, args[0].shape, self.seen)
        output, kinds = self.features.run(executor, args, kwargs, keys, keys, True)
        self.reused &= bool(kinds)
        return output

    def predict_noise(self, executor, *args, **kwargs):
        """PREDICT_NOISE: one evaluation. args: x, timestep, ..."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.evaluation, self.outputs = self.clock.tick(float(args[1].flatten()[0])), None
        denoised = executor(*args, **kwargs)
        self.done(args[0], denoised)
        self.progress()
        return denoised

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options):
        """CALC_COND_BATCH: the branches of one evaluation; extra passes of other nodes are let through."""
        run = lambda chosen: executor(model, chosen, x, timestep, model_options)
        if self.outputs is not None:
            return run(conds)
        if model_options["transformer_options"].get("context_window") is not None:
            raise CalibrationError("models that are sampled in context windows cannot be calibrated")
        reference = reference_branch(conds, self.guider.conds)
        active = [i for i, branch in enumerate(conds) if branch_is_active(branch, self.evaluation.sigma)]
        others = [i for i in active if i != reference]
        if reference not in active or len(others) > 1:
            raise CalibrationError("only one positive and one negative conditioning can be calibrated")
        space = OutputSpace(model.model_sampling, timestep, x)
        return self.branches(run, conds, reference, others, x, space)

    def forecasts(self):
        """What may be forecast under this sampler. Raises CalibrationError when nothing may be."""
        if "jump" not in self.refused:
            return ("JUMP",)
        if not self.guided and not self.reference.reused:
            raise CalibrationError(f"there is nothing to skip: no negative pass, and {self.refused['jump']}")
        return ("ESTIMATE",) if self.guided else ()

    def branches(self, run, conds, reference, others, x, space):
        """Denoised outputs of all branches; here by running them all."""
        self.guided |= bool(others)
        outputs = run(conds)
        self.outputs = float(space.scale.flatten()[0]), *in_output_space(outputs, reference, others, space)
        return outputs

    def done(self, x, denoised):
        """An evaluation at latent `x` gave the guided `denoised`, both [batch, ...]."""
        if self.outputs is None:
            raise CalibrationError("the branches of this guider are not run by the host: nothing can be measured")
        scale, cond, difference = self.outputs
        self.reference.add(self.evaluation, scale, x, denoised, cond, difference)

    def new_features(self):
        """An empty cache of features. Raises CalibrationError for a model without any."""
        if "reuse" in self.refused:
            raise CalibrationError(self.refused["reuse"])
        patcher = self.guider.model_patcher
        return Features(planned_reuse(), patcher, patcher.get_model_object("model_sampling").percent_to_sigma)

    def run_with(self, features, wanted, run, conds):
        """Denoised outputs of all branches, with features from the cache if `wanted`, else stored in it.

        Raises CalibrationError where nothing could be taken from the cache.
        """
        features.begin(self.evaluation, wanted)
        self.features, self.reused, self.seen = features, True, Counter()
        try:
            outputs = run(conds)
        finally:
            self.features = None
        if wanted and not self.reused:
            raise CalibrationError("features cannot be reused: another node's patch needs what they would leave out, "
                                   "or memory ran out")
        return outputs


class FeatureRecorder(Recorder):
    """One full run, at whose evaluations the features of the REACH last ones are tried as well."""

    def __init__(self, guidance_scale, progress):
        super().__init__(guidance_scale, progress)
        self.kept = []   # (ordinal, Features), newest first
        self.flops = {}  # of a pass that computes everything (False), and of one with reused features (True)

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: the run starts. args: noise, latent_image, sampler, sigmas, ..."""
        try:
            result = super().outer_sample(executor, *args, **kwargs)
        finally:
            for _, features in self.kept:
                features.close()
        if self.flops.get(True):
            self.reference.reuse_cost = min(self.flops[True] / self.flops[False], 1.0)
        return result

    def branches(self, run, conds, reference, others, x, space):
        """Denoised outputs of all branches, run in full once older features were tried."""
        ordinal = self.evaluation.ordinal
        for key, features in self.kept if not self.evaluation.is_last else ():
            outputs = self._counted(features, True, run, conds)
            self.reference.add_reused(key, ordinal, *in_output_space(outputs, reference, others, space))
        features = self.kept.pop()[1] if len(self.kept) == REACH else self.new_features()
        self.kept.insert(0, (ordinal, features))
        return super().branches(lambda chosen: self._counted(features, False, run, chosen), conds, reference, others,
                                x, space)

    def _counted(self, features, wanted, run, conds):
        """`run_with`, whose FLOPs are counted the first time."""
        if wanted in self.flops:
            return self.run_with(features, wanted, run, conds)
        with FlopCounterMode(display=False) as counter:
            outputs = self.run_with(features, wanted, run, conds)
        self.flops[wanted] = counter.get_total_flops()
        return outputs


class Fitter(Recorder):
    """One run under a point of the curve, in which the weights of every skipped evaluation are fitted.

    `steps`: the Steps with weights; `error` of the final latent, root mean square, relative to its own.
    """

    def __init__(self, reference, point, progress):
        """reference: the full run of the same sampling; point: a Point whose steps are followed."""
        super().__init__(reference.guidance_scale, progress)
        self.reference = reference
        self.steps = list(point.steps)
        self.known = []  # (sigma, cond, difference), newest first
        self.kept = None
        self.error = 0.0

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: the run starts. args: noise, latent_image, sampler, sigmas, ..."""
        try:
            return super().outer_sample(executor, *args, **kwargs)
        finally:
            if self.kept:
                self.kept.close()

    def branches(self, run, conds, reference, others, x, space):
        """Denoised outputs of all branches: computed, or forecast with weights fitted here and now."""
        step, run = self.steps[self.evaluation.ordinal], self._with_features(run)
        if step.action == "FULL":
            outputs = super().branches(run, conds, reference, others, x, space)
            _, cond, difference = self.outputs
            self.known = [(self.evaluation.sigma, cond, difference), *self.known[:DEPTH - 1]]
            return outputs
        self.outputs = ()
        if step.action == "REUSE":
            return run(conds)
        target = self._target(x, space)
        if step.action == "ESTIMATE":
            outputs = run([c if i == reference else None for i, c in enumerate(conds)])
            _, weights = self._fit(target - take(space.output(outputs[reference])), False, others)
            return self._foreseen(outputs, (), weights, reference, others, space)
        if step.action == "MIX":
            reused = run(conds)
            guided = self.reference.guided(*in_output_space(reused, reference, others, space))
            target = (target - step.mix * guided) / (1 - step.mix)
        outputs = [torch.zeros_like(x) for _ in conds]  # the host leaves inactive branches at zero
        outputs = self._foreseen(outputs, *self._fit(target, True, others), reference, others, space)
        return [mix(a, b, step.mix) for a, b in zip(reused, outputs)] if step.action == "MIX" else outputs

    def done(self, x, denoised):
        """An evaluation is over; the last one gives the error."""
        if self.evaluation.is_last:
            full = self.reference.x[-1] - self.reference.slope[-1] * self.reference.sigmas[-1]
            self.error = rms(take(denoised) - full) / rms(full)

    def _with_features(self, run):
        """`run` with features stored or reused, in policies that reuse them."""
        if not any(step.action in REUSING for step in self.steps):
            return run
        self.kept = self.kept or self.new_features()
        wanted = self.steps[self.evaluation.ordinal].action in REUSING
        return lambda conds: self.run_with(self.kept, wanted, run, conds)

    def _target(self, x, space):
        """The guided output [batch, numbers] that leads back to full sampling."""
        skip, scale = space.denoised(torch.zeros_like(x)), float(space.scale.flatten()[0])
        return self.reference.target(self.evaluation.ordinal, x, skip, scale)

    def _fit(self, target, with_cond, others):
        """Weights of the known conditional outputs (none without `with_cond`) and differences."""
        conds = [take(value) for _, value, _ in self.known] if with_cond else []
        guided = 1 - self.reference.guidance_scale
        differences = [take(value) * guided for _, _, value in self.known] if others else []
        weights = fit([*conds, *differences], target, [sigma for sigma, _, _ in self.known], self.evaluation.sigma)
        return tuple(weights[:len(conds)]), tuple(weights[len(conds):])

    def _foreseen(self, outputs, cond_weights, weights, reference, others, space):
        """Fill in what is not computed of `outputs`, and put the weights into the policy."""
        if cond_weights:
            outputs[reference] = space.denoised(sum(w * cond for w, (_, cond, _) in zip(cond_weights, self.known)))
        for i in others:
            difference = sum(w * value for w, (_, _, value) in zip(weights, self.known))
            outputs[i] = outputs[reference] + space.scale * difference
        at = self.evaluation.ordinal
        self.steps[at] = replace(self.steps[at], cond=cond_weights, difference=weights)
        return outputs


def in_output_space(outputs, reference, others, space):
    """(cond, difference) of denoised outputs of all branches, in output space; difference None without others."""
    cond = outputs[reference]
    return space.output(cond), space.difference(outputs[others[0]], cond) if others else None


def find_policy(model, sampling, budget, search=None, features=False):
    """The policy for `sampling` (Sampling) of `model` (ModelPatcher), at the best point within `budget`.

    search(reference, losses) -> list of Point, None for the exact one. The whole batch of the latent is
    sampled twice: in full, and to fit the weights of the point. features: reused features are tried as well,
    REACH passes more at every evaluation. Raises CalibrationError where calibration is not possible.
    """
    bar = comfy.utils.ProgressBar(2 * sampling.steps)
    reference, losses = recorded(model, sampling, features, lambda: bar.update(1))
    return chosen(model, sampling, reference, (search or find_points)(reference, losses), budget, lambda: bar.update(1))


def recorded(model, sampling, features=False, progress=lambda: None):
    """(Reference, Losses) of one full run; see `find_policy`. progress: called after every evaluation."""
    recorder = (FeatureRecorder if features else Recorder)(sampling.cfg, progress)
    sample(model, sampling, recorder)
    return recorder.reference, Losses(recorder.reference, recorder.forecasts())


def chosen(model, sampling, reference, points, budget, progress=lambda: None):
    """The policy of `points` at the best one within `budget`, whose weights are fitted in one more run."""
    policy = Policy(setup(model, sampling), tuple(reference.sigmas), tuple(points)).at(budget)
    return fitted(model, sampling, reference, policy, progress)


def fitted(model, sampling, reference, policy, progress):
    """The policy with weights for its chosen point, and with the error that was measured there."""
    fitter = Fitter(reference, policy.points[policy.chosen], progress)
    sample(model, sampling, fitter)
    points = list(policy.points)
    points[policy.chosen] = replace(points[policy.chosen], error=fitter.error, steps=tuple(fitter.steps))
    return replace(policy, points=tuple(points))


def sample(model, sampling, observer):
    """Sample as a KSampler does, with a Recorder or Fitter looking on."""
    observed = without_cache(model)
    for kind in WRAPPERS:
        observed.add_wrapper_with_key(kind, KEY, getattr(observer, kind))
    latent = comfy.sample.fix_empty_latent_channels(observed, sampling.latent)
    noise = comfy.sample.prepare_noise(latent, sampling.seed)
    return comfy.sample.sample(observed, noise, sampling.steps, sampling.cfg, sampling.sampler, sampling.scheduler,
                               sampling.positive, sampling.negative, latent, denoise=sampling.denoise,
                               disable_pbar=True, seed=sampling.seed)


def without_cache(model):
    """A clone of `model` that samples in full, whatever nodes of this pack are on it."""
    plain = model.clone()
    plain.model_options["transformer_options"].pop(SETTINGS_KEY, None)
    for kind in WRAPPERS:
        plain.remove_wrappers_with_key(kind, SETTINGS_KEY)
    return plain


def setup(model, sampling):
    """What a policy found for `sampling` of `model` is for."""
    shift = getattr(model.get_model_object("model_sampling"), "shift", None)
    size = size_of(comfy.sample.fix_empty_latent_channels(model, sampling.latent).shape)
    return Setup(model_fingerprint(model), sampling.sampler, sampling.scheduler, sampling.steps, sampling.cfg,
                 None if shift is None else float(shift), size)
