"""Cached features of one run, kept apart per branch and per site of the network, within a budget."""
from collections import Counter
from typing import NamedTuple

from .storage import LEAVING, Storage


class Output(NamedTuple):
    """What a site gave at one evaluation, a tuple of Stored and None; or how it changed from there to the next."""
    ordinal: int
    sigma: float
    feature: tuple


class FeatureMemory:
    """The last outputs of every site for every branch, with the evaluation and sigma they were computed at.

    A branch is the identity of a conditioning, never a position in the batch; a site is one place of
    the network: a tuple that begins with its kind. A feature is a tuple of tensors (None where the
    network gives none). The first features that come, or are foreseen, are promised room for all that will be
    kept of them; a site for which there is no room is not cached at all.
    """

    def __init__(self, settings, depth, least=None):
        """settings: StorageSettings; depth: how many outputs of a site are kept; least: how many are
        recorded before it is ready, None for as many as are kept."""
        self.storage = Storage(settings, depth)
        self.budget = settings.budget
        self.depth, self.least = depth, least or depth
        self.features, self.recorded, self.promised = {}, {}, {}
        self.latest, self.following, self.travels = {}, {}, False

    def record(self, branch, kind, ordinal):
        """Note that the sites of `kind` are computed for `branch` at evaluation `ordinal`, before they are."""
        self.recorded[branch, kind] = (ordinal, *self.recorded.get((branch, kind), ())[:self.least - 1])

    def forget_other_shapes(self, site, features):
        """Drop what `site` gave in other shapes than `features` ({branch: feature}) have now.

        Other nodes may have the host compute it smaller for some evaluations.
        """
        for branch, feature in features.items():
            kept = self.features.get((branch, site))
            if kept and any(t is not None and t.shape != old.data.shape for t, old in zip(feature, kept[0].feature)):
                self._drop(kept)
                del self.features[branch, site], self.promised[branch, site]

    def promise(self, site, features, beside=0):
        """Promise room to `features` ({branch: feature}) of `site`: to all that are new here or to none of them.

        Only their shapes and dtypes count, and these again when the first of them comes. beside: bytes that the
        caller keeps beside each of them.
        """
        new = {(branch, site): beside + sum(self.storage.nbytes(t) for t in feature if t is not None)
               for branch, feature in features.items()
               if (branch, site) not in self.features and self.promised.get((branch, site), 0) is not None}
        if not new:
            return
        self.travels |= any(self.storage.travels(t) for f in features.values() for t in f if t is not None)
        fits = self.budget is None or self._bytes({**self.promised, **new}) <= self.budget
        self.promised.update(new if fits else dict.fromkeys(new))

    def withdraw(self):
        """Take back what was promised to features that were foreseen and did not come."""
        self.promised = {(branch, site): size for (branch, site), size in self.promised.items()
                         if (branch, site) in self.features
                         or (size is None and (branch, site[0]) in self.recorded)}

    def store(self, site, features, sigma, beside=0):
        """Keep copies of `features` ({branch: feature}) as the newest of `site`, as far as there is room.

        beside: as of `promise`.
        """
        self.promise(site, features, beside)
        self._note_order(site)
        for branch, feature in features.items():
            if self.promised[branch, site] is None:
                continue
            kept = list(self.features.pop((branch, site), ()))
            spare = self._make_room(kept, feature)
            self._make_older(kept, feature)
            stored = tuple(t if t is None else self.storage.put(t, old) for t, old in zip(feature, spare))
            ordinal = self.recorded[branch, site[0]][0]
            self.features[branch, site] = (Output(ordinal, sigma, stored), *kept)

    def ready(self, branch, kind, since):
        """True when sites of `kind` were recorded often enough for `branch`, the last time at or after `since`."""
        recorded = self.recorded.get((branch, kind), ())
        if len(recorded) < self.least or recorded[0] < since:
            return False
        return any(b == branch and site[0] == kind and self.holds([b], site) for b, site in self.features)

    def holds(self, branches, site):
        """True when `site` can be recalled for all of `branches`, as it was when its kind was last recorded."""
        return all(self._current(branch, site) for branch in branches)

    def has_past(self, branch, site):
        """True when `site` has outputs enough for `branch`, however old."""
        return len(self.features.get((branch, site), ())) == self.depth

    def recall(self, branches, site):
        """Outputs of `site` for each of `branches`, newest first: [[(sigma, feature)]], not to be written to."""
        found = [[(output.sigma, feature) for output, feature in zip(kept, self._values(kept))]
                 for kept in (self.features[branch, site] for branch in branches)]
        following = self.following.get(site)
        if following is not None and self.holds(branches, following):
            for stored in self._stored(self.features[branch, following] for branch in branches):
                self.storage.expect(stored)
        return found

    def has_room(self):
        """True when something came to be kept, and all of it was promised room."""
        return bool(self.promised) and None not in self.promised.values()

    def sites(self):
        """The sites that were promised room, in the order that they came."""
        return list(dict.fromkeys(site for (_, site), size in self.promised.items() if size is not None))

    def plan(self):
        """What was promised room: sites and bytes, of how many sites."""
        of = len({site for _, site in self.promised})
        return {"sites": len(self.sites()), "of": of, "bytes": self._bytes(self.promised)}

    def forget(self, gone=lambda branch, kind: True):
        """Drop everything, or what `gone` says of a branch and a kind of site."""
        self.storage.settle()
        self.recorded = {key: at for key, at in self.recorded.items() if not gone(*key)}
        for held in (self.features, self.promised):
            for branch, site in [key for key in held if gone(key[0], key[1][0])]:
                del held[branch, site]

    def tensors(self):
        """Every tensor held."""
        return [*(t for stored in self._stored(self.features.values()) for t in stored.held()),
                *self.storage.tensors()]

    def _current(self, branch, site):
        newest = self.recorded.get((branch, site[0]), (None,))[0]
        return self.has_past(branch, site) and self.features[branch, site][0].ordinal == newest

    def _bytes(self, promised):
        """Bytes that `promised` ({(branch, site): bytes or None}) takes, with what of it may be on its way at once.

        That is what leaves, an output each, and a site that comes while the one before it is used.
        """
        sites = Counter()
        for (_, site), size in promised.items():
            sites[site] += size or 0
        if not (self.travels and promised):
            return sites.total()
        return sites.total() + (LEAVING + 1) * max(size or 0 for size in promised.values()) + 2 * max(sites.values())

    def _make_room(self, kept, feature):
        """Drop the oldest of a full list of outputs; what of it `feature` may be written over, None where nothing."""
        if len(kept) < self.depth:
            return [None] * len(feature)
        oldest = kept.pop()
        self._drop([oldest])
        return [old if self.storage.holds_like(old, t) else None for t, old in zip(feature, oldest.feature)]

    def _make_older(self, kept, feature):
        """Make of the newest of outputs `kept` what it is beside a newer `feature`."""
        if kept and self.storage.by_change:
            change = tuple(t if t is None else self.storage.put_change(t - self.storage.get(before))
                           for t, before in zip(feature, kept[0].feature))
            kept[0] = kept[0]._replace(feature=change)

    def _values(self, kept):
        """The features of outputs `kept`, newest first."""
        values = []
        for output in kept:
            feature = tuple(t if t is None else self.storage.get(t) for t in output.feature)
            if values and self.storage.by_change:
                feature = tuple(t if t is None else t - change for t, change in zip(values[-1], feature))
            values.append(feature)
        return values

    def _note_order(self, site):
        if site not in self.following:
            self.following[site] = None
            if site[0] in self.latest:
                self.following[self.latest[site[0]]] = site
            self.latest[site[0]] = site

    def _drop(self, outputs):
        for stored in self._stored([outputs]):
            self.storage.drop(stored)

    @staticmethod
    def _stored(kept):
        return [stored for outputs in kept for output in outputs for stored in output.feature if stored is not None]
