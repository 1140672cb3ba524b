"""Feature reuse in a network of no known family: at the hook that the host calls in place of attention.

The host hands every attention whose caller passes `transformer_options` on to `optimized_attention_override`. All that
is left out is the attention itself, between its projections. Modules with an attention function of their own (0.38 on:
weights made for int8 attention) lose it where an override is set: their calls are taken at that function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor, nn

from ...fastercache_core.features.memory import Branch, Site
from ...fastercache_core.features.reuse import ReuseCache
from .compiler import unrecorded
from .feature_hooks import FeatureRequest, Promises, ranges, swapped

Attention = Callable[..., Tensor]
Call = tuple[str, tuple[float, ...], tuple[float, ...]]  # kind, shapes of one branch's queries and keys


OVERRIDE = "optimized_attention_override"
# The host's class that holds a module's own attention function, where its weights ask for one.
OWN = "ComfyAttention"


@dataclass(frozen=True)
class ContainerOverride:
    """An override that is also given containers of queries, keys and values, to be emptied by what attends to them."""

    override: Attention
    container_function: Attention

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.override(*args, **kwargs)


class CallsDiffer(Exception):
    """A pass called attention otherwise than the one whose features were put into it: its output is wrong."""


class AttentionHook:
    """The attention calls of one network, for one run; used as FeatureHooks.

    A site is a kind and the number of the call in its pass; "self" is attention over as many tokens as it has queries,
    "cross" any other. Batches lie along the first axis of what is attended to.
    """

    def __init__(self, cache: ReuseCache | Promises, network: nn.Module, compiled: bool = False) -> None:
        self.cache = cache
        self._recorded_calls: dict[Branch, list[Call]] = {}
        self._calls: list[Call] = []
        self._request = FeatureRequest((), (), False)
        self._reused: Collection[str] = ()
        self._recorded: Collection[str] = ()
        self._others: Any = None
        hidden = torch.compiler.disable if compiled else lambda function: function
        self._override = hidden(self._attention)
        self._container_override = ContainerOverride(self._override, hidden(self._contained))
        self._own = [
            (module, "function", hidden(partial(self._serve, function)))
            for module in network.modules()
            if type(module).__name__ == OWN and callable(function := module.function)
        ]

    def options(self, transformer_options: Mapping[str, Any], reused: Collection[str]) -> Mapping[str, Any]:
        """The options of a pass in which the kinds `reused` come from the cache."""
        self._others = others = transformer_options.get(OVERRIDE)
        if self._own and others is None:
            return transformer_options
        contained = others is None or hasattr(others, "container_function")
        return {**transformer_options, OVERRIDE: self._container_override if contained else self._override}

    @contextmanager
    def running(self, request: FeatureRequest, reused: Collection[str], recorded: Collection[str]) -> Iterator[None]:
        """See FeatureHooks. Raises CallsDiffer at the end of a pass whose features were those of other calls."""
        self._request, self._reused, self._recorded = request, reused, recorded
        self._calls, before = [], self._recorded_calls
        with swapped(self._own):
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

    def _attention(self, attention: Attention, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the host's `attention`."""
        return self._serve(attention if self._others is None else partial(self._others, attention), *args, **kwargs)

    def _contained(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same for tensors in containers, where the host does not say which attention it is."""
        attention = host_attention.optimized_attention if self._others is None else self._others.container_function
        return self._serve(attention, *args, **kwargs)

    def _serve(self, attention: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What `attention` gives, from the cache where this pass reuses it."""
        if kwargs.get("residual") is not None:  # the output would hold it, and it belongs to this evaluation alone
            return attention(q, k, *args, **kwargs)
        queries, keys = (x.peek() if hasattr(x, "peek") else x for x in (q, k))
        kind = "self" if queries.shape[-2] == keys.shape[-2] else "cross"
        site = kind, len(self._calls)
        self._calls.append((kind, self._own_shape(queries), self._own_shape(keys)))
        del queries, keys
        if kind in self._reused and self._is_as_recorded() and self.cache.holds(site, self._request.branches):
            with unrecorded():
                [output] = self.cache.recall(site, self._request.branches)
            assert output is not None
            return output
        output = attention(q, k, *args, **kwargs)
        if kind in self._recorded:
            with unrecorded():
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
