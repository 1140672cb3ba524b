"""Feature reuse: outputs of parts of the network, at skipped evaluations, from their last values.

FasterCache (arXiv 2410.19355) eq. 5: F_{t-1} = F_t + (F_t - F_{t+2}) * w(t). Which parts: attention outputs after their
projection and before gate and residual, so that the modulation of the current step still applies (FasterCache; PAB,
arXiv 2408.12588, with an interval for each kind of attention); what a run of blocks adds to its input (Delta-DiT, arXiv
2406.01125); the deep part of a UNet (DeepCache, CVPR 2024); ResBlock halves and transformer branches (FRDiff, arXiv
2312.03517).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..clock import Evaluation, Interval
from ..forecast import reachable
from .gains import Gains, gains_bytes
from .memory import Branch, Feature, FeatureMemory, Site
from .storage import StorageSettings

# How many outputs of a site each forecast needs.
OUTPUTS = {"fitted": 3, "spaced": 2, "constant": 2, "ramp": 2, "hold": 1}
REUSE_WEIGHTS = tuple(OUTPUTS)

# A branch that was not computed for so many intervals has a past too old to continue.
PATIENCE = 2


@dataclass(frozen=True)
class ReuseSettings:
    """Which features are reused, how old they may get, and how they are carried forward.

    intervals: {kind of site: Interval}: features are at most `every` - 1 evaluations old, and reused inside the window.
    weight: "fitted" = along the polynomials in sigma through the last two and three outputs, by gains that are fitted
        for each picture; "spaced" = along the line through the last two; "ramp" = the paper's w(t), `w_first` at the
        first reuse and `w` at the last step; "constant" = `w` throughout; "hold" = the newest output as it is.
    w: with one evaluation in two computed, 0.5 continues the last change at its own speed.
    last: the last evaluation may reuse, too. blocks: how many of the blocks that have such features, None for all.
    depths: ((name, intervals), ...), the one that saves most first: of these the first that the model has and that
        memory holds is taken in place of `intervals`.
    """

    intervals: Mapping[str, Interval] = field(default_factory=lambda: {"self": Interval()})
    weight: str = "fitted"
    w: float = 0.5
    storage: StorageSettings = StorageSettings()
    depths: tuple[tuple[str, Mapping[str, Interval]], ...] = ()
    w_first: float = 0.0
    last: bool = False
    blocks: int | None = None

    def within(self, evaluations: int) -> ReuseSettings:
        """The same, with features of any age below so many evaluations."""

        def every(intervals: Mapping[str, Interval]) -> dict[str, Interval]:
            return {kind: replace(interval, every=evaluations) for kind, interval in intervals.items()}

        depths = tuple((name, every(intervals)) for name, intervals in self.depths)
        return replace(self, intervals=every(self.intervals), depths=depths)


def planned_reuse(storage: StorageSettings = StorageSettings(), last: bool = False) -> ReuseSettings:
    """FRDiff's features, held as they were at the last keyframe, however old that is. last: at the last step, too."""
    return ReuseSettings({"branch": Interval(10**6)}, "hold", storage=storage, last=last)


class ReuseCache:
    """Feature reuse during one run.

    kinds: of sites that are cached; due: those that the current evaluation may take from the cache.
    """

    def __init__(self, settings: ReuseSettings, percent_to_sigma: Callable[[float], float]) -> None:
        self.settings = settings
        self.windows = {kind: i.window.sigmas(percent_to_sigma) for kind, i in settings.intervals.items()}
        self.kinds, outputs = list(self.windows), OUTPUTS[settings.weight]
        self.memory = FeatureMemory(settings.storage, outputs, outputs + (settings.weight == "fitted"))
        self.gains = Gains()
        self.started_at: float | None = None
        self.evaluation = Evaluation(-1, 0.0, 0.0, is_last=True)
        self.due: set[str] = set()
        self._computed_at: dict[str, int] = {}

    def begin(self, evaluation: Evaluation) -> None:
        """Find the kinds of sites that `evaluation` may skip: computed before, not too long ago, inside their window.

        The evaluation that ends a run is skipped only where that is asked for: its error reaches the result undamped.
        """
        self.evaluation = evaluation
        self._forget_useless()
        self.due = {kind for kind in self._useful() & self._computed_at.keys() if self._may_skip(kind)}

    def reusable(self, branches: Iterable[Branch]) -> set[str]:
        """Kinds that are due and were recorded recently enough for every branch.

        A branch that was skipped for longer than the interval has stale features: it is computed in full first.
        """
        branches = list(branches)
        return {kind for kind in self.due if all(self._fresh(kind, branch) for branch in branches)}

    def to_store(self) -> set[str]:
        """Kinds of sites that may be reused after this evaluation: their outputs are of use."""
        return set() if self.evaluation.is_last else self._useful()

    def begin_record(self, branches: Sequence[Branch | None], kinds: Iterable[str]) -> None:
        """Note that this evaluation computes the sites of `kinds` for `branches` (None: not stored)."""
        for kind in kinds:
            for branch in branches:
                if branch is not None:
                    self.memory.record(branch, kind, self.evaluation.ordinal)
            self._computed_at[kind] = self.evaluation.ordinal

    def promise(self, site: Site, expected: Iterable[Branch], feature: Feature, count: int, axis: int = 0) -> None:
        """Promise room at `site` to the branches `expected`: to each for one of `count` slices of `feature`."""
        for part in parts_of(feature, count, axis)[:1]:
            self.memory.promise(site, dict.fromkeys(expected, part), self._beside(feature, count, axis))

    def store(self, site: Site, branches: Sequence[Branch | None], feature: Feature, axis: int = 0) -> None:
        """Store a `feature` of `site`, one equal slice of `axis` for each branch (None: not stored).

        A feature that cannot be cut so is not stored.
        """
        parts = zip(branches, parts_of(feature, len(branches), axis), strict=False)
        own = {branch: part for branch, part in parts if branch is not None}
        self.memory.forget_other_shapes(site, own)
        for branch, part in own.items():
            self._learn(branch, site, part, axis)
        self.memory.store(site, own, self.evaluation.sigma, self._beside(feature, len(branches), axis))

    def holds(self, site: Site, branches: Iterable[Branch]) -> bool:
        """True when `site` can be recalled for every one of `branches`."""
        return self.memory.holds(branches, site)

    def recall(self, site: Site, branches: Sequence[Branch], axis: int = 0) -> Feature:
        """Feature of `site` from the cache, batched along `axis` in the order of `branches`: new tensors."""
        if self.started_at is None:
            self.started_at = self.evaluation.progress
        recalled = zip(branches, self.memory.recall(branches, site), strict=True)
        parts = [self._forecast(branch, site, outputs, axis) for branch, outputs in recalled]
        if len(parts) == 1:
            return parts[0]
        joined = [[t for t in values if t is not None] for values in zip(*parts, strict=True)]
        return tuple(torch.cat(values, axis) if values else None for values in joined)

    def forget(self, branch: Branch) -> None:
        """Forget one branch, so that it is computed next."""
        self._forget(lambda b, kind: b == branch)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return self.memory.tensors() + self.gains.tensors()

    def reset(self) -> None:
        """Forget everything, so that the next evaluation is computed."""
        self._forget(lambda branch, kind: True)
        self._computed_at.clear()

    def _useful(self) -> set[str]:
        """Kinds of sites that may be reused at this evaluation or after it."""
        if self.evaluation.is_last and not self.settings.last:
            return set()
        return {kind for kind, (_, low) in self.windows.items() if low <= self.evaluation.sigma}

    def _may_skip(self, kind: str) -> bool:
        high, low = self.windows[kind]
        return low <= self.evaluation.sigma <= high and self._computed_at[kind] > self._oldest(kind)

    def _fresh(self, kind: str, branch: Branch) -> bool:
        return self.memory.ready(branch, kind, self._oldest(kind) + 1)

    def _oldest(self, kind: str, intervals: int = 1) -> int:
        """The last evaluation that is so many intervals ago."""
        return self.evaluation.ordinal - intervals * self.settings.intervals[kind].every

    def _beside(self, feature: Feature, count: int, axis: int) -> int:
        """Bytes of the gains of each of `count` slices of `feature`."""
        if self.settings.weight != "fitted":
            return 0
        return sum(gains_bytes(t.shape[axis] // count) for t in feature if t is not None)

    def _forget_useless(self) -> None:
        """Forget what will not be reused: kinds past their window, and branches that have not come back.

        Such as the windows of a long video, where these move on.
        """
        alive = self._useful()
        old = {
            (branch, kind)
            for (branch, kind), newest in self.memory.last_recorded().items()
            if kind not in alive or newest < self._oldest(kind, PATIENCE)
        }
        if old:
            self._forget(lambda branch, kind: (branch, kind) in old)

    def _forget(self, gone: Callable[[Branch, str], bool]) -> None:
        self.memory.forget(gone)
        self.gains.forget(lambda key: gone(key[0], key[1][0]))

    def _learn(self, branch: Branch, site: Site, feature: Feature, axis: int) -> None:
        """Compare a feature that was computed with the forecast from its last outputs."""
        if self.settings.weight != "fitted" or not self.memory.has_past(branch, site):
            return
        [outputs] = self.memory.recall([branch], site)
        sigmas, features = zip(*outputs, strict=True)
        if len(reachable(sigmas, self.evaluation.sigma)) < len(sigmas):
            return
        for i, (value, *past) in enumerate(zip(feature, *features, strict=True)):
            if value is not None:
                self.gains.learn((branch, site, i), value, past, sigmas, self.evaluation.sigma, axis)

    def _forecast(self, branch: Branch, site: Site, outputs: Sequence[tuple[float, Feature]], axis: int) -> Feature:
        """The feature of a branch at this evaluation, from its last `outputs`: new tensors."""
        sigma = self.evaluation.sigma
        sigmas, features = zip(*outputs, strict=True)
        if self.settings.weight == "fitted":
            near = reachable(sigmas, sigma)
            nodes, tensors = [sigmas[i] for i in near], zip(*(features[i] for i in near), strict=True)
            return tuple(
                None
                if past[0] is None
                else blend(past, self.gains.steps((branch, site, i), nodes, sigma, past[0]), axis)
                for i, past in enumerate(tensors)
            )
        if len(features) == 1 or sigmas[0] == sigmas[1]:
            return tuple(None if a is None else a.clone() for a in features[0])
        w = self._weight(sigmas)
        return tuple(None if a is None else extrapolate(a, b, w) for a, b in zip(*features, strict=True))

    def _weight(self, sigmas: Sequence[float]) -> float:
        """w(t) of eq. 5 from outputs computed at two `sigmas`, newest first."""
        if self.settings.weight == "spaced":
            return spaced_weight(sigmas, self.evaluation.sigma)
        return reuse_weight(self.settings, self.evaluation.progress, self.started_at or 0.0)


def reuse_weight(settings: ReuseSettings, progress: float, started_at: float) -> float:
    """w(t) of "hold", "constant" and "ramp" at `progress` (0 to 1) when the first reuse was at `started_at`."""
    if settings.weight == "hold":
        return 0.0
    if settings.weight == "constant":
        return settings.w
    return settings.w_first + (settings.w - settings.w_first) * (progress - started_at) / max(1.0 - started_at, 1e-6)


def spaced_weight(sigmas: Sequence[float], sigma: float) -> float:
    """w(t) of "spaced": how far `sigma` lies beyond outputs computed at `sigmas` (newest, older); 0 if too far."""
    newest, older = sigmas
    return (sigma - newest) / (newest - older) if len(reachable(sigmas, sigma)) == 2 else 0.0


def extrapolate(newest: Tensor, older: Tensor, w: float | Tensor) -> Tensor:
    """Eq. 5: newest + (newest - older) * w, a new tensor of the same shape and dtype. w: a tensor broadcasts."""
    return torch.lerp(older, newest, 1.0 + w)


def blend(past: Sequence[Tensor], steps: Tensor, axis: int) -> Tensor:
    """The newest of outputs `past` (newest first) and the differences between them times `steps`: a new tensor.

    steps: [pictures or 1, outputs - 1]; `axis` of an output counts the pictures. Only differences are multiplied, so
    that small dtypes cost no precision.
    """
    if len(past) == 1:
        return past[0].clone()
    shape = [-1 if i == axis else 1 for i in range(past[0].dim())]
    shares = [step.reshape(shape) for step in steps.to(past[0].dtype).unbind(1)]
    result = extrapolate(past[0], past[1], shares[0])
    for newer, older, share in zip(past[1:], past[2:], shares[1:], strict=False):
        result.addcmul_(newer - older, share)
    return result


def parts_of(feature: Feature, count: int, axis: int) -> list[Feature]:
    """The `count` equal slices of a feature along `axis`; none where it has no such."""
    if any(t is not None and t.shape[axis] % count for t in feature):
        return []
    parts = [[None] * count if t is None else t.chunk(count, axis) for t in feature]
    return list(zip(*parts, strict=True))
