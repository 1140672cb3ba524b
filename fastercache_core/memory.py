"""Cached features of one run, kept apart per branch and per site of the network."""


class FeatureMemory:
    """The last two outputs of every site for every branch.

    A branch is the identity of a conditioning, never a position in the batch; a site is one
    attention module. Tensors are copied in, so later in-place work of the host on its own
    activations cannot reach the cache.
    """

    def __init__(self):
        self.features = {}
        self.recorded = {}

    def record(self, branch, ordinal):
        """Note that `branch` is computed in full at evaluation `ordinal`, before its sites are."""
        self.recorded[branch] = (ordinal, *self.recorded.get(branch, ())[:1])

    def store(self, branch, site, feature):
        """Keep a copy of `feature` as the newest output of `site` for `branch`."""
        older = self.features.get((branch, site), (None,))[0]
        self.features[branch, site] = (feature.clone(), older)

    def ready(self, branch, since, depth):
        """True when `branch` was recorded `depth` times, the last time at or after `since`."""
        recorded = self.recorded.get(branch, ())
        return len(recorded) >= depth and recorded[0] >= since

    def recall(self, branch, site):
        """(newest, older) output of `site` for `branch`; older is None after one recording."""
        return self.features[branch, site]

    def forget(self):
        """Drop everything."""
        self.features.clear()
        self.recorded.clear()

    def tensors(self):
        """Every tensor held."""
        return [t for pair in self.features.values() for t in pair if t is not None]
