"""Feature reuse in a network of no known family: at the hook that the host calls in place of attention.

The host hands every attention whose caller passes `transformer_options` on to `optimized_attention_override`. All that
is left out is the attention itself, between its projections.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...fastercache_core.features.memory import Branch, Site
from ...fastercache_core.features.reuse import ReuseCache
from .feature_hooks import FeatureRequest, Promises, ranges

Call = tuple[str, tuple[float, ...], tuple[float, ...]]  # kind, shapes of one branch's queries and keys


class CallsDiffer(Exception):
    """A pass called attention otherwise than the one whose features were put into it: its output is wrong."""


class AttentionHook:
    """The attention calls of one network, for one run; used as FeatureHooks.

    A site is a kind and the number of the call in its pass; "self" is attention over as many tokens as it has queries,
    "cross" any other. Batches lie along the first axis of what is attended to.
    """

    def __init__(self, cache: ReuseCache | Promises, compiled: bool = False) -> None:
        self.cache = cache
        self._recorded_calls: dict[Branch, list[Call]] = {}
        self._calls: list[Call] = []
        self._request = FeatureRequest((), (), False)
        self._reused: Collection[str] = ()
        self._recorded: Collection[str] = ()
        self._others: Callable[..., Tensor] | None = None
        self._override = torch.compiler.disable(self._attention) if compiled else self._attention

    def options(self, transformer_options: Mapping[str, Any], reused: Collection[str]) -> dict[str, Any]:
        """The options of a pass in which the kinds `reused` come from the cache."""
        self._others = transformer_options.get("optimized_attention_override")
        return {**transformer_options, "optimized_attention_override": self._override}

    @contextmanager
    def running(self, request: FeatureRequest, reused: Collection[str], recorded: Collection[str]) -> Iterator[None]:
        """See FeatureHooks. Raises CallsDiffer at the end of a pass whose features were those of other calls."""
        self._request, self._reused, self._recorded = request, reused, recorded
        self._calls, before = [], self._recorded_calls
        yield
        if reused and any(before.get(branch) != self._calls for branch in request.branches):
            self._recorded_calls = {b: calls for b, calls in before.items() if b not in request.branches}
            raise CallsDiffer
        for branch in request.kept if recorded else ():
            if branch is not None and before.setdefault(branch, self._calls) != self._calls:
                self.cache.forget(branch)
                before[branch] = self._calls

    def where(self, sites: Sequence[Site]) -> dict[str, dict[str, str]]:
        """The calls that `sites` are, by kind: {kind: {"attention calls": "0, 2, 4"}}."""
        kinds = dict.fromkeys(kind for kind, _ in sites)
        return {kind: {"attention calls": ranges(sorted(n for k, n in sites if k == kind))} for kind in kinds}

    def _attention(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = "self" if q.shape[-2] == k.shape[-2] else "cross"
        site = kind, len(self._calls)
        self._calls.append((kind, self._own_shape(q), self._own_shape(k)))
        if kind in self._reused and self._is_as_recorded() and self.cache.holds(site, self._request.branches):
            [output] = self.cache.recall(site, self._request.branches)
            assert output is not None
            return output
        others = self._others
        output = attention(q, k, *args, **kwargs) if others is None else others(attention, q, k, *args, **kwargs)
        if kind in self._recorded:
            self.cache.store(site, self._request.kept, (output,))
        return output

    def _is_as_recorded(self) -> bool:
        """True when this call is the one that was recorded at its place."""
        place = slice(len(self._calls) - 1, len(self._calls))
        return all(
            self._recorded_calls.get(branch, [])[place] == self._calls[place] for branch in self._request.branches
        )

    def _own_shape(self, x: Tensor) -> tuple[float, ...]:
        """The shape of one branch's part of `x`."""
        return x.shape[0] / len(self._request.branches), *x.shape[1:]
