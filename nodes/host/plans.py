"""What every evaluation of a run does where that was laid down beforehand: FRDiff's mixing, or a policy."""
import math
from dataclasses import replace

import comfy.samplers
from comfy.model_sampling import CONST

from ...fastercache_core.mixing import MixSchedule, MixSettings, flow_timestep
from ...fastercache_core.policy import FULL, Step
from ...fastercache_core.reuse import ReuseSettings
from ...fastercache_core.schedule import Interval
from ...fastercache_core.storage import StorageSettings
from .identity import other_size, size_of
from .samplers import sampler_facts, sampler_name

# What a plan wants happens: intervals never ask for more.
ALWAYS = Interval(10 ** 6)

# How near an evaluation's sigma must be to the one that the policy was found for, in log sigma.
NEAR = 1e-2
# At so many times its own cfg a policy's weights still were no worse than forecasts measured during the run.
SAME_CFG = (0.5, 1.1)
# Moved to fewer steps than this share of its own, or than so many, a policy was no longer clearly better than
# plain fewer steps.
FEW_SHARE, FEW = 0.75, 20
# Samplers that use the negative pass by itself (CFG++), and the highest cfg at which FRDiff did them no harm.
CFG_PP, CFG_PP_MOST = "_cfg_pp", 1.5
# Actions that need features from the cache.
REUSING = ("REUSE", "MIX")


def make_plan(settings, guider, sampler, sigmas, shape):
    """The plan of a run under `settings` (CacheSettings), None when it has none.

    sigmas: floats, as handed to the sampler. shape: of the latent, [batch, channels, ...].
    """
    plan = settings.plan
    if plan is None or sampler_facts(sampler) is None:
        return None
    if isinstance(plan, MixSettings):
        reason = nothing_to_gain(plan, guider, sampler)
        return FullPlan(reason) if reason else MixPlan(
            plan, guider.model_patcher.get_model_object("model_sampling"), sampler_facts(sampler), sigmas,
            settings.jump is not None)
    return PolicyPlan(plan, guider, sampler, sigmas, size_of(shape))


def planned_reuse(storage=StorageSettings()):
    """ReuseSettings of plans: FRDiff's features, held as they were at the last key evaluation."""
    return ReuseSettings({"branch": ALWAYS}, "hold", storage=storage)


def nothing_to_gain(settings, guider, sampler):
    """Why FRDiff was farther from full sampling than fewer steps with this sampler, a sentence; None where it was not.

    settings: MixSettings. Measured sampler by sampler, docs/frdiff.md.
    """
    facts, name = sampler_facts(sampler), sampler_name(sampler)
    if name.endswith(CFG_PP) and facts.order > 1:
        return (f"sampler {name} builds on earlier outputs of the negative pass: FRDiff would harm it, "
                "nothing is skipped")
    if name.endswith(CFG_PP) and getattr(guider, "cfg", 1.0) > CFG_PP_MOST:
        return (f"sampler {name} is made for a cfg of about 1, this run has {guider.cfg:g}: FRDiff would harm it, "
                "nothing is skipped")
    if settings.mixing == "automatic" and facts.order > 1 and facts.calls == 1 and not facts.noise:
        return (f"sampler {name} builds on earlier evaluations, where fewer steps can be better than reused features: "
                "nothing is skipped (score_mixing features reuses them all the same)")
    return None


class FullPlan:
    """Everything in full, for a reason."""

    reuses = False

    def __init__(self, reason):
        self.notes = [reason]

    def at(self, evaluation):
        """The Step of an evaluation."""
        return FULL


class MixPlan:
    """FRDiff: keyframes, and between them the last score, reused features or a mix of both.

    Samplers with several calls a step have their keyframe at the last one: errors of the first only
    move the point that is probed. Where scores may not be held (may_jump), features are reused.
    "automatic" holds scores throughout: at equal cost that was nearer to full sampling than the paper's
    lambda on our models, whether they predict noise or velocity. See also `nothing_to_gain`.
    """

    notes = ()

    def __init__(self, settings, model_sampling, facts, sigmas, may_jump):
        flow = isinstance(model_sampling, CONST)
        if settings.mixing == "automatic":
            settings = replace(settings, mixing="scores")
        timestep = flow_timestep if flow else lambda sigma: model_sampling.timestep(_tensor(sigma, model_sampling))
        self.schedule = MixSchedule(settings, model_sampling.percent_to_sigma, timestep, sigmas)
        self.phase = facts.calls - 1
        self.may_jump = may_jump
        self.reuses = not may_jump or settings.mixing != "scores"

    def at(self, evaluation):
        """The Step of an evaluation."""
        if evaluation.is_last or self.schedule.is_keyframe(evaluation, self.phase):
            return FULL
        share = self.schedule.share(evaluation) if self.may_jump else 1.0
        return Step({0.0: "JUMP", 1.0: "REUSE"}.get(share, "MIX"), mix=share)


class PolicyPlan:
    """A policy, for the evaluations that this run will make.

    notes: sentences on where this run is not what the policy was found for.
    """

    def __init__(self, policy, guider, sampler, sigmas, size):
        facts, evaluations, found = sampler_facts(sampler), sigmas[:-1], policy.setup
        self.notes = list(other_settings(found, guider, sampler, size))
        if not _weights_serve(found, guider):
            policy = policy.without_weights()
        # What lies between the sigmas of a sampler with more calls a step is known from calibration only.
        usable = facts.calls == 1 or found.steps == len(evaluations)
        if facts.calls == 1:
            moved = policy.for_sigmas(evaluations)
            self.notes += [other_grid(found, len(evaluations))] if moved is not policy else []
            policy = moved
        self.expected = list(zip(policy.sigmas, policy.steps)) if usable else []
        self.reuses = any(step.action in REUSING for _, step in self.expected)

    def at(self, evaluation):
        """The Step of an evaluation; FULL where the run is not where the policy expects it."""
        if evaluation.ordinal >= len(self.expected) or evaluation.is_last:
            return FULL
        sigma, step = self.expected[evaluation.ordinal]
        return step if _near(evaluation.sigma, sigma) else FULL


def other_settings(found, guider, sampler, size):
    """Sentences on how a run differs from the Setup `found`, its evaluations aside."""
    if _other_cfg(found, guider):
        left = "near enough for its weights" if _weights_serve(found, guider) else "its fitted weights are left out"
        yield f"the policy was found at cfg {found.cfg:g}, this run has {guider.cfg:g}: {left}"
    if not _is_sampler(found.sampler, sampler):
        yield f"the policy was found with sampler {found.sampler}, this run has {sampler_name(sampler)}"
    if other_size(found.resolution, size):
        yield (f"the policy was found at latent size {found.resolution}, this run has {size}: other steps may be "
               "best there")


def other_grid(found, steps):
    """The sentence for a run of `steps` steps at other noise levels than those of the Setup `found`."""
    if steps == found.steps:
        return (f"the policy was found at other noise levels ({found.scheduler}): the nearest ones are computed, and "
                "fitted weights are left out")
    few = steps < max(FEW_SHARE * found.steps, min(FEW, found.steps))
    doubt = "; with so few, find a policy for them: plain fewer steps may be as good" if few else ""
    return (f"the policy was found for {found.steps} steps, this run has {steps}: the nearest noise levels are "
            f"computed, and fitted weights are left out{doubt}")


def _other_cfg(found, guider):
    cfg = getattr(guider, "cfg", None)
    return cfg is not None and not math.isclose(cfg, found.cfg, abs_tol=1e-6)


def _weights_serve(found, guider):
    low, high = (share * found.cfg for share in SAME_CFG)
    return not _other_cfg(found, guider) or low <= guider.cfg <= high


def _is_sampler(name, sampler):
    """True when the host's sampler `name` (one of a KSampler's choices) is the function of `sampler`."""
    known = name in comfy.samplers.SAMPLER_NAMES
    return known and sampler_name(comfy.samplers.sampler_object(name)) == sampler_name(sampler)


def _near(sigma, other):
    return sigma > 0 and abs(math.log(sigma / other)) < NEAR


def _tensor(sigma, model_sampling):
    return model_sampling.sigmas.new_tensor(sigma)
