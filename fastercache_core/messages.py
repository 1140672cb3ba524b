"""Every sentence that a user reads in a report or a log: why something was not skipped, and what was chosen instead.

Those with places are functions: the `format` of a text, or small ones of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .law import Law

# Run

NOTHING_ON = "every method is switched off: nothing is skipped"
NO_REFERENCE = "which of this guider's conditionings is the positive one could not be found: nothing is skipped"
GUIDANCE_UNKNOWN = (
    "how strongly this guider weighs its conditionings could not be measured at every step: it counts as strong there, "
    "and less is skipped"
)
UNKNOWN_REGION = "another node samples the latent in parts that cannot be told apart: they are always computed"
LATENT_MOVED = "between two steps something else moved the latent: what was known of it was dropped there"
NO_UNCOND = "no unconditional pass to skip: cfg is 1.0, there is no negative, or another node runs it by itself"
NOTHING_WITHIN_INTERVAL = "nothing was skipped: the interval, the window or the small number of steps left no room"
TOO_FEW_STEPS = "nothing was skipped: with so few steps, forecasts are not accurate enough"
TOO_MUCH_CHANGE = "nothing was skipped: too much changes from step to step for forecasts that are accurate enough"
STEP_BY_STEP = (
    "nothing was skipped: a run of one or two steps has nothing to predict from, and knows nothing of the runs before "
    "it"
)
NOISE_RISES = "this run goes from less noise to more: nothing is skipped"
# In so few steps little can be predicted without a policy; in so few nothing.
FEW_STEPS, NO_STEPS = 12, 2


def nothing_skipped(uses_errors: bool, steps: int, features_may_help: bool) -> str:
    """Why nothing was skipped. uses_errors: skipping depends on error estimates; features_may_help: none were used."""
    if steps <= NO_STEPS:
        return STEP_BY_STEP
    if not uses_errors:
        return NOTHING_WITHIN_INTERVAL
    reason = TOO_FEW_STEPS if steps <= FEW_STEPS else TOO_MUCH_CHANGE
    return reason + ("; feature_reuse may still save something" if features_may_help else "")


below_target = "{:g} dB counts as {:g} dB with sampler {}: below that, its forecasts are not reliable".format
features_not_needed = (
    "with sampler {} whole steps are predicted, which was closer at the same cost than reused features: no features "
    "are cached"
).format
probed = "features were probed {} times: a computed step was run once more with features from the cache".format


def features_not_reused(were_probed: bool, steps: int) -> str:
    """Why cached features were never used. were_probed: their error was measured."""
    early = "there are too few steps" if steps <= FEW_STEPS else "too much changes from step to step"
    reason = "with them the picture would miss the target" if were_probed else early
    return f"features were cached but not reused: {reason}"


# Several nodes on one model

one_says = "of {} this model follows {}, not {}: both are on it".format


def takes_row(row: str, source: str, family: str | None) -> str:
    """Whose published settings count. family: of the model that has none of its own, None where they were chosen."""
    return f"published settings: {row} ({source})" + (f", for {family}" if family else "")


def left_out(part: str, node: str, policy: str) -> str:
    """What a policy leaves no room for."""
    return f"{part} of {node} left out: the policy of {policy} says all of every step"


LEARNS_ALONE = "learn is off: other nodes on this model skip as well, and errors are learnt from steps alone"


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
answered_elsewhere = (
    "another node on this model answered in place of the network at {} of {} steps: from the first one on nothing is "
    "skipped here, remove one of the two"
).format
TILES_MOVE = "another node samples the latent in parts that move from step to step: no features are reused for those"
SEVERAL_DEVICES = "MultiGPU CFG Split runs the branches on several devices at once: no features are reused there"
NAG = "NAGuidance mixes the branches inside the network and needs both in every pass: nothing is skipped"
CROWDED = "another node runs as many passes again for each step: no step is predicted beside them"
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
adds_noise_guided = "sampler {} adds noise at every step: steps are predicted only without guidance".format
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
    "the policy was found on {}, but this model is {}. Find one for this model with FasterCache Auto-FR, or use it "
    "all the same with other_model of FasterCache FRDiff."
).format
frdiff_cfg_pp_order = "sampler {} builds on earlier negative outputs: FRDiff would harm it, nothing is skipped".format
frdiff_cfg_pp_cfg = (
    "sampler {} is for a cfg of about 1, this run has {:g}: FRDiff would harm it, nothing is skipped".format
)
frdiff_multistep = (
    "sampler {} builds on earlier evaluations, where fewer steps can be better than reused features: nothing is "
    "skipped (score_mixing paper or features reuses them all the same)"
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

COMPILER_OFF = (
    "Comfy Compiler is off during this run: it repeats passes as they were recorded, reused features change them"
)
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
