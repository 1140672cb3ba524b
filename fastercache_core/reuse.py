"""Dynamic feature reuse: attention outputs of skipped evaluations from their last two values.

FasterCache (arXiv 2410.19355) eq. 5: F_{t-1} = F_t + (F_t - F_{t+2}) * w(t). What is cached is
the attention output after its projection and before gate and residual, so the modulation of
the current step still applies.
"""
from dataclasses import dataclass, field

import torch

from .memory import FeatureMemory
from .schedule import Interval, IntervalSchedule

REUSE_WEIGHTS = ("constant", "linear", "hold")


@dataclass(frozen=True)
class ReuseSettings:
    """How attention outputs are reused.

    weight: "linear" = the paper's w(t), 0 at the first reuse and `w` at the end of sampling;
        "constant" = `w` throughout; "hold" = the newest output as it is.
    w: with one evaluation in two computed, 0.5 continues the last change at its own speed.
    """
    interval: Interval = field(default_factory=Interval)
    weight: str = "constant"
    w: float = 0.5


def reuse_weight(settings, progress, started_at):
    """w(t) at `progress` (0 to 1) for a run whose first reuse was at `started_at`."""
    if settings.weight == "hold":
        return 0.0
    if settings.weight == "constant":
        return settings.w
    return settings.w * (progress - started_at) / max(1.0 - started_at, 1e-6)


def extrapolate(newest, older, w):
    """Eq. 5: newest + (newest - older) * w, a new tensor of the same shape and dtype."""
    return torch.lerp(older, newest, 1.0 + w)


class ReuseCache:
    """Dynamic feature reuse during one run."""

    def __init__(self, settings, percent_to_sigma):
        self.settings = settings
        self.schedule = IntervalSchedule(settings.interval, percent_to_sigma)
        self.memory = FeatureMemory()
        self.depth = 1 if settings.weight == "hold" else 2
        self.started_at = None
        self.wanted = False
        self.w = 0.0

    def begin(self, evaluation):
        """Decide once per evaluation whether reuse is wanted, and with which w(t)."""
        self.wanted = self.schedule.may_skip(evaluation)
        if self.wanted and self.started_at is None:
            self.started_at = evaluation.progress
        if self.wanted:
            self.w = reuse_weight(self.settings, evaluation.progress, self.started_at)

    def may_reuse(self, evaluation, branches):
        """True when reuse is wanted and every branch was recorded recently enough.

        A branch that was skipped for longer than the interval has stale features: it is
        computed in full first.
        """
        since = evaluation.ordinal - self.settings.interval.every + 1
        return self.wanted and all(self.memory.ready(b, since, self.depth) for b in branches)

    def begin_record(self, evaluation, branches):
        """Note that `evaluation` computes and stores every site for `branches` (None: skip)."""
        for branch in branches:
            if branch is not None:
                self.memory.record(branch, evaluation.ordinal)
        self.schedule.computed(evaluation)

    def store(self, site, branches, output):
        """Store `output` [branches * batch, ...] of `site`, one equal slice per branch (None: skip)."""
        for branch, part in zip(branches, output.chunk(len(branches))):
            if branch is not None:
                self.memory.store(branch, site, part)

    def recall(self, site, branches):
        """Output of `site` from the cache, [branches * batch, ...] in the order of `branches`."""
        parts = [self._recall(branch, site) for branch in branches]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensors(self):
        """Every tensor held."""
        return self.memory.tensors()

    def reset(self):
        """Forget everything, so that the next evaluation is computed."""
        self.memory.forget()
        self.schedule.reset()

    def _recall(self, branch, site):
        newest, older = self.memory.recall(branch, site)
        if self.w == 0.0 or older is None:
            return newest.clone()
        return extrapolate(newest, older, self.w)
