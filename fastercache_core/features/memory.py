"""Cached features of one run, by branch and by site of the network, within a memory budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .storage import LEAVING, Storage, StorageSettings, Stored

Branch = Hashable
Site = tuple[Any, ...]  # its kind, then whatever tells it from others
Feature = tuple[Tensor | None, ...]
Place = tuple[Branch, Site]


class Output(NamedTuple):
    """What a site gave at one evaluation, or how that changed from there to the next newer output."""

    ordinal: int
    sigma: float
    feature: tuple[Stored | None, ...]


class FeatureMemory:
    """The last outputs of every site for every branch, with the evaluation and sigma they were computed at.

    A branch is the identity of a conditioning, never a position in the batch; a site is one place of the network: a
    tuple that begins with its kind. A feature is a tuple of tensors (None where the network gives none). The first
    features that come, or are expected, are promised room for all outputs that will be stored of them; a site without
    room is not cached at all.
    """

    def __init__(self, settings: StorageSettings, depth: int, least: int | None = None) -> None:
        """depth: how many outputs of a site are stored; least: how many are recorded before it is ready, None for as
        many as are stored."""
        self.storage = Storage(settings, depth)
        self.budget = settings.budget
        self.depth, self.least = depth, least or depth
        self._outputs: dict[Place, tuple[Output, ...]] = {}  # newest first
        self._recorded: dict[tuple[Branch, str], tuple[int, ...]] = {}  # ordinals, newest first
        self._promised: dict[Place, int | None] = {}  # bytes, None where there is no room
        self._latest: dict[str, Site] = {}
        self._following: dict[Site, Site | None] = {}
        self._travels = False

    def offer(self, budget: int, pinned: int = 0) -> None:
        """Set the bytes that may be held, and how much main memory may be page-locked."""
        self.budget, self.storage.pinned_limit = budget, pinned

    def record(self, branch: Branch, kind: str, ordinal: int) -> None:
        """Note that the sites of `kind` are computed for `branch` at evaluation `ordinal`, before they are."""
        self._recorded[branch, kind] = (ordinal, *self._recorded.get((branch, kind), ())[: self.least - 1])

    def last_recorded(self) -> dict[tuple[Branch, str], int]:
        """The evaluation at which each kind was last recorded for each branch; empty before the first one."""
        return {key: newest for key, (newest, *_) in self._recorded.items()}

    def forget_other_shapes(self, site: Site, features: Mapping[Branch, Feature]) -> None:
        """Drop what `site` gave in other shapes than `features` have now.

        Other nodes may have the host compute it smaller for some evaluations.
        """
        for branch, feature in features.items():
            held = self._outputs.get((branch, site))
            if held and not _alike(feature, held[0].feature):
                self._drop(self._outputs.pop((branch, site)))
                del self._promised[branch, site]

    def promise(self, site: Site, features: Mapping[Branch, Feature], beside: int = 0) -> None:
        """Promise room to `features` of `site`: to all that are new here or to none of them.

        Only their shapes and dtypes count, and these again when the first of them comes. beside: bytes that the caller
        holds beside each of them.
        """
        new = {
            (branch, site): beside + sum(self.storage.nbytes(t) for t in feature if t is not None)
            for branch, feature in features.items()
            if (branch, site) not in self._outputs and self._promised.get((branch, site), 0) is not None
        }
        if not new:
            return
        self._travels |= any(self.storage.travels(t) for f in features.values() for t in f if t is not None)
        fits = self.budget is None or self._bytes({**self._promised, **new}) <= self.budget
        self._promised.update(new if fits else dict.fromkeys(new))

    def withdraw(self) -> None:
        """Take back what was promised to features that were expected and did not come."""
        self._promised = {
            (branch, site): size
            for (branch, site), size in self._promised.items()
            if (branch, site) in self._outputs or (size is None and (branch, site[0]) in self._recorded)
        }

    def store(self, site: Site, features: Mapping[Branch, Feature], sigma: float, beside: int = 0) -> None:
        """Store copies of `features` as the newest of `site`, as far as there is room. beside: as of `promise`."""
        self.promise(site, features, beside)
        self._note_order(site)
        for branch, feature in features.items():
            if self._promised[branch, site] is None:
                continue
            held = list(self._outputs.pop((branch, site), ()))
            spare = self._make_room(held, feature)
            self._make_older(held, feature)
            stored = tuple(t if t is None else self.storage.put(t, old) for t, old in zip(feature, spare, strict=True))
            ordinal = self._recorded[branch, site[0]][0]
            self._outputs[branch, site] = (Output(ordinal, sigma, stored), *held)

    def ready(self, branch: Branch, kind: str, since: int) -> bool:
        """True when sites of `kind` were recorded often enough for `branch`, the last time at or after `since`."""
        recorded = self._recorded.get((branch, kind), ())
        if len(recorded) < self.least or recorded[0] < since:
            return False
        return any(b == branch and site[0] == kind and self.holds([b], site) for b, site in self._outputs)

    def holds(self, branches: Iterable[Branch], site: Site) -> bool:
        """True when `site` can be recalled for all of `branches`, as it was when its kind was last recorded."""
        return all(self._is_current(branch, site) for branch in branches)

    def has_past(self, branch: Branch, site: Site) -> bool:
        """True when `site` has outputs enough for `branch`, however old."""
        return len(self._outputs.get((branch, site), ())) == self.depth

    def recall(self, branches: Sequence[Branch], site: Site) -> list[list[tuple[float, Feature]]]:
        """Outputs of `site` for each of `branches`, newest first: [[(sigma, feature)]], not to be written to."""
        held = [self._outputs[branch, site] for branch in branches]
        recalled = [
            [(output.sigma, feature) for output, feature in zip(outputs, self._values(outputs), strict=True)]
            for outputs in held
        ]
        following = self._following.get(site)
        if following is not None and self.holds(branches, following):
            for stored in _stored(self._outputs[branch, following] for branch in branches):
                self.storage.expect(stored)
        return recalled

    def has_room(self) -> bool:
        """True when something came to be stored, and all of it was promised room."""
        return bool(self._promised) and None not in self._promised.values()

    def sites(self) -> list[Site]:
        """The sites that were promised room, in the order that they came."""
        return list(dict.fromkeys(site for (_, site), size in self._promised.items() if size is not None))

    def plan(self) -> dict[str, int]:
        """What was promised room: sites and bytes, of how many sites."""
        of = len({site for _, site in self._promised})
        return {"sites": len(self.sites()), "of": of, "bytes": self._bytes(self._promised)}

    def forget(self, gone: Callable[[Branch, str], bool] = lambda branch, kind: True) -> None:
        """Drop everything, or what `gone` says of a branch and a kind of site."""
        self.storage.settle()
        self._recorded = {key: at for key, at in self._recorded.items() if not gone(*key)}
        for branch, site in [key for key in self._promised if gone(key[0], key[1][0])]:
            self._drop(self._outputs.pop((branch, site), ()))
            del self._promised[branch, site]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*(t for stored in _stored(self._outputs.values()) for t in stored.held()), *self.storage.tensors()]

    def _is_current(self, branch: Branch, site: Site) -> bool:
        newest, *_ = self._recorded.get((branch, site[0]), (None,))
        return self.has_past(branch, site) and self._outputs[branch, site][0].ordinal == newest

    def _bytes(self, promised: Mapping[Place, int | None]) -> int:
        """Bytes that `promised` takes, with what of it may be on its way at once.

        That is what leaves, an output each, and a site that comes while the one before it is used.
        """
        sites: Counter[Site] = Counter()
        for (_, site), size in promised.items():
            sites[site] += size or 0
        total = sum(sites.values())
        if not (self._travels and promised):
            return total
        return total + (LEAVING + 1) * max(size or 0 for size in promised.values()) + 2 * max(sites.values())

    def _make_room(self, held: list[Output], feature: Feature) -> list[Stored | None]:
        """Drop the oldest of a full list of outputs; what of it `feature` may be written over, None where nothing."""
        if len(held) < self.depth:
            return [None] * len(feature)
        oldest = held.pop()
        self._drop([oldest])
        pairs = zip(feature, oldest.feature, strict=True)
        return [old if self.storage.holds_like(old, t) else None for t, old in pairs]

    def _make_older(self, held: list[Output], feature: Feature) -> None:
        """Make of the newest of outputs `held` what it is beside a newer `feature`."""
        if held and self.storage.by_change:
            newest = held[0]
            pairs = zip(feature, newest.feature, strict=True)
            changes = (t - self.storage.get(old) if t is not None and old else None for t, old in pairs)
            stored = tuple(change if change is None else self.storage.put_change(change) for change in changes)
            held[0] = newest._replace(feature=stored)
            self._drop([newest])

    def _values(self, outputs: Iterable[Output]) -> list[Feature]:
        """The features of `outputs`, newest first."""
        values: list[Feature] = []
        for output in outputs:
            feature = tuple(t if t is None else self.storage.get(t) for t in output.feature)
            if values and self.storage.by_change:
                changes = zip(values[-1], feature, strict=True)
                feature = tuple(None if t is None or change is None else t - change for t, change in changes)
            values.append(feature)
        return values

    def _note_order(self, site: Site) -> None:
        if site not in self._following:
            self._following[site] = None
            if site[0] in self._latest:
                self._following[self._latest[site[0]]] = site
            self._latest[site[0]] = site

    def _drop(self, outputs: Iterable[Output]) -> None:
        for stored in _stored([outputs]):
            self.storage.drop(stored)


def _stored(held: Iterable[Iterable[Output]]) -> list[Stored]:
    return [stored for outputs in held for output in outputs for stored in output.feature if stored is not None]


def _alike(feature: Feature, stored: Sequence[Stored | None]) -> bool:
    """True when `feature` has the shapes of what is stored."""
    shapes = [None if t is None else t.shape for t in feature]
    return shapes == [None if old is None else old.data.shape for old in stored]
