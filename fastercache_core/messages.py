"""Every sentence that a user reads in a report or a log: why something was not skipped, and what was chosen instead.

Those with places are functions: the `format` of a text, or small ones of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .law import Law

# Run

NOTHING_ON = "every method is switched off: nothing is skipped"
NO_REFERENCE = "the positive conditioning of this guider was not found: nothing is skipped"
NO_UNCOND = "no unconditional pass to skip: cfg is 1.0, there is no negative, or another node runs it by itself"
NOTHING_WITHIN_INTERVAL = "nothing was skipped: the interval, the window or the small number of steps left no room"
FORECASTS_TOO_POOR = (
    "nothing was skipped: the forecasts of this run were not accurate enough, with too few steps or too much change "
    "between them"
)


def nothing_skipped(uses_errors: bool, features_may_help: bool) -> str:
    """Why nothing was skipped. uses_errors: skipping depends on error estimates; features_may_help: none were used."""
    if not uses_errors:
        return NOTHING_WITHIN_INTERVAL
    return FORECASTS_TOO_POOR + ("; feature_reuse may still save something" if features_may_help else "")


below_target = "{:g} dB counts as {:g} dB with sampler {}: below that, its forecasts are not reliable".format
features_not_needed = (
    "with sampler {} whole steps are predicted, which was closer at the same cost than reused features: no features "
    "are cached"
).format
probed = "features were probed {} times: a computed step was run once more with features from the cache".format


def features_not_reused(were_probed: bool) -> str:
    """Why cached features were never used. were_probed: their error was measured."""
    reason = (
        "with them the picture would miss the target"
        if were_probed
        else "there are too few steps, or too much changes between them"
    )
    return f"features were cached but not reused: {reason}"


# Learning on the user's own model

NOTHING_LEARNT = (
    "nothing was learnt: that takes a run without a mask or context windows, under a preset with a closeness, in which "
    "a tenth of the steps or more was skipped"
)
learnt_unreadable = "what was learnt on this model is not used, {}".format
not_learnt = "what this run showed was not kept, {}".format


def calibrated(kind: str, law: Law, unknown: Law) -> str:
    """What the law of a model's errors is by. unknown: that for a model of which nothing is known."""
    pictures = f"{law.pictures} picture{'s' if law.pictures > 1 else ''}"
    change = round(law.low - unknown.low)
    bolder = f"{change} dB bolder" if change > 0 else f"{-change} dB more careful" if change else "no bolder"
    return f"calibrated on this model, {kind}, {pictures}: {bolder} than for a model not seen before"


def learnt(kind: str, law: Law, unknown: Law) -> str:
    """What a run with `learn` on gave; see `calibrated`."""
    return f"sampled in full as well, to learn: the next run is {calibrated(kind, law, unknown)}"


# Compatibility

EASYCACHE = "EasyCache or LazyCache is on the same model: nothing is skipped here, remove one of the two"
MULTIGPU = "sampling on several GPUs at once is not supported yet: nothing is skipped"
NAG = "NAGuidance mixes the branches inside the network and needs both in every pass: nothing is skipped"
BRANCHES_ONE_BY_ONE = "another node runs the branches one by one: no step is predicted"
unknown_sampler = "the network calls of sampler {} are not known beforehand: nothing is skipped".format
unknown_reuses = (
    "sampler {} is not known here: no step and no negative pass is predicted; features are reused with much reserve, "
    "as far as their error was measured in this run"
).format
sampler_adapts = "sampler {} chooses its steps by what the network gives: nothing is skipped".format
NO_SIGMAS = "this run's noise levels are not known beforehand: no step and no negative pass is predicted"
wraps = (
    "sampler {} hands its work to {} and counts as that, as long as the latent moves as that sampler moves it".format
)
not_wrapped = "sampler {} moves the latent in other ways than {}: from there on nothing is skipped".format
adds_noise = "sampler {} adds noise at every step: no step is predicted".format
extrapolates = (
    "sampler {} continues differences between evaluations, and errors with them: the negative pass is always computed"
).format
builds_on_differences = "sampler {} builds on differences between evaluations: no step is predicted".format


def no_feature_kinds(family: str, kinds: Iterable[str]) -> str:
    return f"{family} has no {' or '.join(kinds)} features to reuse: all of it always runs"


# Policies

POLICY_NOT_MOVED = "the policy cannot be moved to the noise levels of this run: nothing is skipped"


def other_cfg(found: float, cfg: float, weights_fit: bool) -> str:
    """A run at another cfg than the policy's. weights_fit: near enough for its fitted weights."""
    left = "near enough for its weights" if weights_fit else "its fitted weights are left out"
    return f"the policy was found at cfg {found:g}, this run has {cfg:g}: {left}"


other_sampler = "the policy was found with sampler {}, this run has {}".format
other_size = "the policy was found at latent size {}, this run has {}: other steps may be best there".format
other_sigmas = (
    "the policy was found at other noise levels ({}): the nearest are computed, without fitted weights".format
)


def other_grid(found: int, steps: int, too_few: bool) -> str:
    """A run of another number of steps than the policy's. too_few: the policy may be no better than fewer steps."""
    doubt = "; with so few, find a policy for them: simply fewer steps may be as good" if too_few else ""
    return (
        f"the policy was found for {found} steps, this run has {steps}: the nearest noise levels are computed, "
        f"without fitted weights{doubt}"
    )


policy_does_not_fit = (
    "the policy was found on {}, but this model is {}. Find one for this model with FasterCache Auto-FR, or switch on "
    "other_model to use it all the same."
).format
frdiff_cfg_pp_order = "sampler {} builds on earlier negative outputs: FRDiff would harm it, nothing is skipped".format
frdiff_cfg_pp_cfg = (
    "sampler {} is for a cfg of about 1, this run has {:g}: FRDiff would harm it, nothing is skipped".format
)
frdiff_multistep = (
    "sampler {} builds on earlier evaluations, where fewer steps can be better than reused features: nothing is "
    "skipped (score_mixing features reuses them all the same)"
).format


uses_found = (
    "uses the policy that FasterCache Auto-FR found for this model, sampler and steps on {}: {}, {:.1%} error of the "
    "latent (switch found_policy off to decide anew)"
).format
found_unreadable = "the policy that was found for this model cannot be used: {}".format
keeps_found = (
    "Kept in {}: FasterCache and FasterCache KSampler use it by themselves for this model, sampler, steps and cfg."
).format
policy_would_help = (
    "with so few steps a policy skips more at the same closeness: FasterCache Auto-FR finds one for this model, "
    "sampler and steps, once, in about the time of {} pictures, and it is then used here by itself"
).format


# Features

PASS_DIFFERS = "a pass called attention in another order than the one before it: it was computed again in full"
OUT_OF_MEMORY = (
    "memory ran out: cached features were dropped, and none are cached for the rest of this run; set memory_gb, or "
    "keep them on the cpu"
)
OUT_OF_MEMORY_AT_ONCE = (
    "memory ran out before any feature was cached: none are cached in this run; keeping them on the cpu may help"
)
# Why a depth was passed over, see `automatic_depth`.
NO_MEMORY, NOT_IN_MODEL, PATCHED = "not enough memory", "not in this model", "patched by another node"


def features_fit(plan: str, depth: str | None) -> str:
    """The log line on which features have room; plan: `report.features_text`, depth: `automatic_depth`, if any."""
    return f"FasterCache: features of {plan}" + (f"; {depth}" if depth else "")


patched_kind = "a patch of another node works on the inside of {} features: they are computed every time".format


def no_room(kinds: Iterable[str], megabytes: float) -> str:
    return (
        f"no {' or '.join(kinds)} feature fits into {megabytes:.1f} MB: nothing is reused; raise memory_gb, choose a "
        "smaller memory_dtype, or keep features on the cpu"
    )


def no_feature(kinds: Iterable[str]) -> str:
    return f"no {' or '.join(kinds)} feature was found in this run: nothing is reused"


def automatic_depth(depth: str, family: str, passed_over: Mapping[str, str]) -> str:
    """The depth that was chosen for a model family. passed_over: {depth: why not}."""
    others = "".join(f"; {name}: {reason}" for name, reason in passed_over.items())
    return f"automatic depth: {depth} saves most of what {family} has and memory holds{others}"


def instead(family: str, kind: str, other: str | None) -> str:
    found = f"{other} is reused instead" if other else "it always runs"
    return f"{family} has no {kind} features that can be taken alone: {found}"


def found_blocks(family: str, lists: Iterable[str]) -> str:
    """lists: the lists of blocks that are reused."""
    return (
        f"feature reuse does not know {family}: its blocks ({', '.join(lists)}) were found as it ran, and checked "
        "once, with what they gave taken from the cache: the output was the same"
    )


def unknown_family(family: str, lists: Iterable[str], other_output: bool, cached: bool) -> str:
    """lists: of blocks that were found, and not reused; other_output: as the output was another one with them;
    cached: attention is reused."""
    blocks = (
        "its blocks cannot be reused, as with them from the cache the output was another one"
        if other_output
        else f"its blocks ({', '.join(lists)}) are not what was asked for, or have no room"
        if lists
        else "no list of its blocks runs in order, each on what the one before it gave"
    )
    attention = "only its attention is reused" if cached else "its attention cannot be skipped either"
    return f"feature reuse does not know {family}: {blocks}; {attention}"


# Calibration

CONTEXT_WINDOWS = "models that are sampled in context windows cannot be calibrated"
ONE_NEGATIVE = "only one positive and one negative conditioning can be calibrated"
NOT_RUN_BY_HOST = "the branches of this guider are not run by the host: nothing can be measured"
NOT_REUSABLE = "features cannot be reused: another node's patch needs what they would leave out, or memory ran out"
nothing_to_skip = "there is nothing to skip: no negative pass, and {}".format
