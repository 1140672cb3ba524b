"""Feature reuse in a network of no known family: at the hook that the host calls in place of attention.

The host hands every attention whose caller passes `transformer_options` on to `optimized_attention_override`.
All that is left out is the attention itself, between its projections.
"""
from contextlib import contextmanager

import torch

from .sites import ranges


class CallsDiffer(Exception):
    """A pass called attention otherwise than the one whose features were put into it: its output is wrong."""


class AttentionCalls:
    """The attention calls of one network, for one run; used as a `FeatureSwap`.

    cache: a ReuseCache. A site is a kind and the number of the call in its pass; "self" is attention over as many
    tokens as it has queries, "cross" any other. Batches lie along the first axis of what is attended to.
    """

    def __init__(self, cache, compiled=False):
        self.cache = cache
        self.known, self.calls = {}, []
        self.branches = self.kept = self.reused = self.recorded = ()
        self.others = None
        self.override = torch.compiler.disable(self._override) if compiled else self._override

    def options(self, transformer_options, reused):
        """The options of a pass in which the kinds `reused` come from the cache."""
        self.others = transformer_options.get("optimized_attention_override")
        return {**transformer_options, "optimized_attention_override": self.override}

    @contextmanager
    def running(self, branches, kept, reused, recorded):
        """While open, calls of the kinds `reused` come from the cache, those of `recorded` are stored.

        Raises CallsDiffer at the end of a pass whose features were those of other calls.
        """
        self.branches, self.kept, self.reused, self.recorded = branches, kept, reused, recorded
        self.calls = []
        yield
        if reused and any(self.known.get(branch) != self.calls for branch in branches):
            self.known = {branch: calls for branch, calls in self.known.items() if branch not in branches}
            raise CallsDiffer
        for branch in kept if recorded else ():
            if branch is not None and self.known.setdefault(branch, self.calls) != self.calls:
                self.cache.forget(branch)
                self.known[branch] = self.calls

    def where(self, sites):
        """The calls that `sites` are, by kind: {kind: {"attention calls": "0, 2, 4"}}."""
        kinds = dict.fromkeys(kind for kind, _ in sites)
        return {kind: {"attention calls": ranges(sorted(n for k, n in sites if k == kind))} for kind in kinds}

    def _override(self, attention, q, k, *args, **kwargs):
        kind = "self" if q.shape[-2] == k.shape[-2] else "cross"
        site = kind, len(self.calls)
        self.calls.append((kind, self._own_shape(q), self._own_shape(k)))
        if kind in self.reused and self._as_known() and self.cache.holds(site, self.branches):
            return self.cache.recall(site, self.branches)[0]
        compute = attention if self.others is None else lambda *a, **kw: self.others(attention, *a, **kw)
        output = compute(q, k, *args, **kwargs)
        if kind in self.recorded:
            self.cache.store(site, self.kept, (output,))
        return output

    def _as_known(self):
        """True when this call is the one that was recorded at its place."""
        return all(self.known.get(branch, [])[len(self.calls) - 1:len(self.calls)] == self.calls[-1:]
                   for branch in self.branches)

    def _own_shape(self, x):
        """The shape of one branch's part of `x`."""
        return x.shape[0] / len(self.branches), *x.shape[1:]
