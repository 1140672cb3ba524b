"""Feature reuse: outputs of parts of the network, at skipped evaluations, from their last values.

FasterCache (arXiv 2410.19355) eq. 5: F_{t-1} = F_t + (F_t - F_{t+2}) * w(t). Which parts: attention
outputs after their projection and before gate and residual, so that the modulation of the current
step still applies (FasterCache; PAB, arXiv 2408.12588, with an interval for each kind of attention);
what a run of blocks adds to its input (Delta-DiT, arXiv 2406.01125); the deep part of a UNet
(DeepCache, CVPR 2024); ResBlock halves and transformer branches (FRDiff, arXiv 2312.03517).
"""
from dataclasses import dataclass, field, replace

import torch

from .gains import Gains, gains_bytes
from .memory import FeatureMemory
from .schedule import Interval, IntervalSchedule
from .storage import StorageSettings

# How many outputs of a site each forecast needs.
OUTPUTS = {"measured": 3, "spaced": 2, "constant": 2, "linear": 2, "hold": 1}
REUSE_WEIGHTS = tuple(OUTPUTS)

# No further beyond the newest output than this many times its distance from the one before.
REACH = 2.0
# A branch that was not computed for so many intervals has a past too old to continue.
PATIENCE = 2


@dataclass(frozen=True)
class ReuseSettings:
    """Which features are reused, how often they are computed, and how they are carried forward.

    intervals: {kind of site: Interval}, see `nodes.host.families.KINDS`.
    weight: "measured" = along the polynomials in sigma through the last two and three outputs, by gains
        that are fitted for each picture to what really happened; "spaced" = along the line through the last two;
        "linear" = the paper's w(t), 0 at the first reuse and `w` at the end of sampling; "constant" = `w`
        throughout; "hold" = the newest output as it is.
    w: with one evaluation in two computed, 0.5 continues the last change at its own speed.
    depths: ((name, intervals), ...), the one that saves most first: of these the first that the model has and
        that memory holds is taken in place of `intervals`.
    """
    intervals: dict = field(default_factory=lambda: {"self": Interval()})
    weight: str = "measured"
    w: float = 0.5
    storage: StorageSettings = StorageSettings()
    depths: tuple = ()

    def within(self, evaluations):
        """The same, with features of any age below so many evaluations."""
        every = lambda intervals: {kind: replace(interval, every=evaluations) for kind, interval in intervals.items()}
        return replace(self, intervals=every(self.intervals),
                       depths=tuple((name, every(intervals)) for name, intervals in self.depths))


def reuse_weight(settings, progress, started_at):
    """w(t) of "hold", "constant" and "linear" at `progress` (0 to 1) when the first reuse was at `started_at`."""
    if settings.weight == "hold":
        return 0.0
    if settings.weight == "constant":
        return settings.w
    return settings.w * (progress - started_at) / max(1.0 - started_at, 1e-6)


def spaced_weight(sigmas, sigma):
    """w(t) of "spaced": how far `sigma` lies beyond outputs computed at `sigmas` (newest, older); 0 if too far."""
    newest, older = sigmas
    return (sigma - newest) / (newest - older) if len(reachable(sigmas, sigma)) == 2 else 0.0


def extrapolate(newest, older, w):
    """Eq. 5: newest + (newest - older) * w, a new tensor of the same shape and dtype.

    w: float, or a tensor that broadcasts.
    """
    return torch.lerp(older, newest, 1.0 + w)


def blend(past, steps, axis):
    """The newest of outputs `past` (newest first) and the differences between them times `steps`: a new tensor.

    steps: [pictures or 1, outputs - 1]; `axis` of an output counts the pictures. Only differences are
    multiplied, so that small dtypes cost no precision.
    """
    if len(past) == 1:
        return past[0].clone()
    shape = [-1 if i == axis else 1 for i in range(past[0].dim())]
    shares = [step.reshape(shape) for step in steps.to(past[0].dtype).unbind(1)]
    result = extrapolate(*past[:2], shares[0])
    for newer, older, share in zip(past[1:], past[2:], shares[1:]):
        result.addcmul_(newer - older, share)
    return result


def reachable(sigmas, sigma):
    """Places of the outputs, computed at `sigmas` (newest first), that a polynomial to `sigma` may pass through.

    Samplers with several evaluations a step visit sigmas twice, or two that lie very close together.
    """
    kept, way = [0], abs(sigma - sigmas[0])
    for i, older in enumerate(sigmas[1:], 1):
        if abs(sigmas[kept[-1]] - older) * REACH >= max(way, 1e-6 * abs(older)):
            kept.append(i)
    return kept


def parts_of(feature, count, axis):
    """The `count` equal slices of a feature (tuple of tensors or None) along `axis`; none where it has no such."""
    if any(t is not None and t.shape[axis] % count for t in feature):
        return []
    parts = [[None] * count if t is None else t.chunk(count, axis) for t in feature]
    return list(zip(*parts))


class ReuseCache:
    """Feature reuse during one run."""

    def __init__(self, settings, percent_to_sigma):
        self.settings = settings
        self.schedules = {kind: IntervalSchedule(interval, percent_to_sigma)
                          for kind, interval in settings.intervals.items()}
        outputs = OUTPUTS[settings.weight]
        self.memory = FeatureMemory(settings.storage, outputs, outputs + (settings.weight == "measured"))
        self.gains = Gains()
        self.started_at = None
        self.evaluation = None
        self.due = set()

    def begin(self, evaluation, wanted=None):
        """Decide which kinds of sites may be skipped: by the intervals, or if `wanted` all inside their windows."""
        self.evaluation = evaluation
        self._forget_useless()
        self.due = {kind for kind, schedule in self.schedules.items()
                    if (schedule.may_skip(evaluation) if wanted is None else wanted and schedule.inside(evaluation))}
        if self.due and self.started_at is None:
            self.started_at = evaluation.progress

    def reusable(self, branches):
        """Kinds that are due and were recorded recently enough for every branch.

        A branch that was skipped for longer than the interval has stale features: it is
        computed in full first.
        """
        return {kind for kind in self.due if all(self._fresh(kind, branch) for branch in branches)}

    def worth_storing(self):
        """Kinds of sites that may be reused after this evaluation: their outputs are worth storing."""
        if self.evaluation.is_last:
            return set()
        return {kind for kind, schedule in self.schedules.items() if schedule.low < self.evaluation.sigma}

    def begin_record(self, branches, kinds):
        """Note that this evaluation computes the sites of `kinds` for `branches` (None: not stored)."""
        for kind in kinds:
            for branch in branches:
                if branch is not None:
                    self.memory.record(branch, kind, self.evaluation.ordinal)
            self.schedules[kind].computed(self.evaluation)

    def promise(self, site, expected, feature, count, axis=0):
        """Promise room at `site` to the branches `expected`: to each for one of `count` slices of `feature`."""
        for part in parts_of(feature, count, axis)[:1]:
            self.memory.promise(site, dict.fromkeys(expected, part), self._beside(feature, count, axis))

    def store(self, site, branches, feature, axis=0):
        """Store a `feature` (tuple of tensors or None) of `site`, one equal slice of `axis` for each branch.

        A feature that cannot be cut so is not stored.
        """
        parts = zip(branches, parts_of(feature, len(branches), axis))
        own = {branch: part for branch, part in parts if branch is not None}
        self.memory.forget_other_shapes(site, own)
        for branch, part in own.items():
            self._learn(branch, site, part, axis)
        self.memory.store(site, own, self.evaluation.sigma, self._beside(feature, len(branches), axis))

    def holds(self, site, branches):
        """True when `site` can be recalled for every one of `branches`."""
        return self.memory.holds(branches, site)

    def recall(self, site, branches, axis=0):
        """Feature of `site` from the cache, batched along `axis` in the order of `branches`: new tensors."""
        kept = self.memory.recall(branches, site)
        parts = [self._forecast(branch, site, outputs, axis) for branch, outputs in zip(branches, kept)]
        if len(parts) == 1:
            return parts[0]
        return tuple(None if values[0] is None else torch.cat(values, axis) for values in zip(*parts))

    def forget(self, branch):
        """Forget one branch, so that it is computed next."""
        self._forget(lambda b, kind: b == branch)

    def tensors(self):
        """Every tensor held."""
        return self.memory.tensors() + self.gains.tensors()

    def reset(self):
        """Forget everything, so that the next evaluation is computed."""
        self._forget(lambda branch, kind: True)
        for schedule in self.schedules.values():
            schedule.reset()

    def _beside(self, feature, count, axis):
        """Bytes of the gains of each of `count` slices of `feature`."""
        if self.settings.weight != "measured":
            return 0
        return sum(gains_bytes(t.shape[axis] // count) for t in feature if t is not None)

    def _fresh(self, kind, branch):
        return self.memory.ready(branch, kind, self.evaluation.ordinal - self.schedules[kind].every + 1)

    def _forget_useless(self):
        """Forget what has had its time: kinds past their window, and branches that have not come back.

        Such as the windows of a long video, where these move on.
        """
        at, alive, recorded = self.evaluation.ordinal, self.worth_storing(), self.memory.recorded
        old = {(branch, kind) for (branch, kind), (newest, *_) in recorded.items()
               if kind not in alive or at - newest > PATIENCE * self.schedules[kind].every}
        if old:
            self._forget(lambda branch, kind: (branch, kind) in old)

    def _forget(self, gone):
        self.memory.forget(gone)
        self.gains.forget(lambda key: gone(key[0], key[1][0]))

    def _learn(self, branch, site, feature, axis):
        """Compare a feature that was computed with what its last outputs foretold."""
        if self.settings.weight != "measured" or not self.memory.has_past(branch, site):
            return
        [outputs] = self.memory.recall([branch], site)
        sigmas, kept = zip(*outputs)
        if len(reachable(sigmas, self.evaluation.sigma)) < len(sigmas):
            return
        for i, (value, *past) in enumerate(zip(feature, *kept)):
            if value is not None:
                self.gains.learn((branch, site, i), value, past, sigmas, self.evaluation.sigma, axis)

    def _forecast(self, branch, site, outputs, axis):
        """The feature of a branch at this evaluation, from its last `outputs`: new tensors."""
        sigmas, kept = zip(*outputs)
        if self.settings.weight == "measured":
            places = reachable(sigmas, self.evaluation.sigma)
            nodes, kept = [sigmas[i] for i in places], [kept[i] for i in places]
            steps = lambda i, a: self.gains.steps((branch, site, i), nodes, self.evaluation.sigma, a)
            return tuple(None if a is None else blend((a, *past), steps(i, a), axis)
                         for i, (a, *past) in enumerate(zip(*kept)))
        if len(kept) == 1 or sigmas[0] == sigmas[1]:
            return tuple(None if a is None else a.clone() for a in kept[0])
        w = (spaced_weight(sigmas, self.evaluation.sigma) if self.settings.weight == "spaced" else
             reuse_weight(self.settings, self.evaluation.progress, self.started_at))
        return tuple(None if a is None else extrapolate(a, b, w) for a, b in zip(*kept))
