"""The host's network, as the engine runs it: one evaluation of one region."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...fastercache_core.protocols import FeatureUse, Pass, Result
from .conditioning import Key, branch_keys, keys_ahead, rows_asked, window_of
from .feature_pass import FeaturePass, FeatureRequest
from .model_call import BranchesCall, ModelCall

# Where the network finds, in the transformer's options, what it was asked for.
REQUEST_KEY = "fastercache_request"


@dataclass
class Request:
    """What the engine asked for in one run of the network, and what came of it.

    features: None where none are cached; ahead: branches of this evaluation whose features will be stored; only: the
    one branch that uses features, None for all; tiled: another node may run the latent in parts. rows: what
    entered the network; reused: branches that took features from the cache, of these kinds.
    """

    features: FeaturePass | None = None
    use: FeatureUse = FeatureUse.STORE
    ahead: Sequence[Key] = ()
    only: int | None = None
    tiled: bool = False
    rows: int = 0
    reused: set[int] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    seen: Counter[Any] = field(default_factory=Counter)
    counting: Any = field(default_factory=threading.Lock)  # networks on several devices serve a request at once

    def serve(self, call: ModelCall) -> torch.Tensor:
        """Run one batch of chunks, with features from the cache where they were asked for."""
        with self.counting:
            self.rows += call.x.shape[0]
        if self.features is None:
            return call.run()
        branches = branch_keys(call.options, call.x.shape, self.seen)
        kept = [branch if self._keeps(branch) else None for branch in branches]
        ahead = [branch for branch in self.ahead if self._keeps(branch)]
        request = FeatureRequest(branches, kept, self.use is not FeatureUse.STORE, ahead, self.tiled)
        output, kinds = self.features.run(call, request)
        if kinds:
            self.reused.update(branch[1] for branch in branches)
            self.kinds |= kinds
        return output

    def _keeps(self, branch: Key) -> bool:
        return self.use is not FeatureUse.PROBE and self.only in (None, branch[1])


class HostNetwork:
    """The network of one evaluation of one region; see protocols.Network."""

    def __init__(self, call: BranchesCall, features: FeaturePass | None, reference_only: bool = False) -> None:
        """reference_only: only the reference branch uses features."""
        self.call, self.features, self.reference_only = call, features, reference_only
        self.controls: dict[int, RememberedControl] | None = None  # where this evaluation runs the network again
        self.answered = False  # somebody else did, in place of the network

    def run(self, pass_: Pass, branches: Sequence[Any], features: FeatureUse) -> Result:
        """Run `branches`: those of the pass, None for one that must not run."""
        request = self._request(pass_, features)
        if features is FeatureUse.PROBE:
            options = self.call.options["transformer_options"]
            if not (request.features and request.features.reusable(request.ahead, options)):
                return Result([])
            self.controls = {}
        if self.controls is not None:
            branches = remembering(branches, self.controls)
        outputs = self.call.run(branches, REQUEST_KEY, request)
        self.answered |= request.rows < rows_asked(branches, pass_.evaluation.sigma, len(pass_.x))
        deep = bool(request.kinds) and FeaturePass.deep(request.kinds)
        return Result(outputs, frozenset(request.reused), request.rows, deep)

    def using(self, features: FeaturePass) -> HostNetwork:
        """The same network with other features, one of several runs in an evaluation."""
        network = HostNetwork(self.call, features)
        network.controls = self.controls = {} if self.controls is None else self.controls
        return network

    def _request(self, pass_: Pass, use: FeatureUse) -> Request:
        if self.features is None:
            return Request()
        window = window_of(self.call.options["transformer_options"])
        ahead = keys_ahead(pass_.branches, window, pass_.x.shape, pass_.evaluation.sigma)
        tiled = "model_function_wrapper" in self.call.options
        return Request(self.features, use, ahead, pass_.reference if self.reference_only else None, tiled)


class RememberedControl:
    """A ControlNet of the host whose residuals are computed once in an evaluation for every batch that asks."""

    def __init__(self, control: Any) -> None:
        self.control = control
        self.residuals: dict[Any, Any] = {}
        self.seen: Counter[Any] = Counter()

    def begin(self) -> None:
        """The network runs once more: the same batches come again in the same order."""
        self.seen.clear()

    def get_control(self, x: torch.Tensor, t: torch.Tensor, cond: Any, count: int, options: Any) -> Any:
        """The residuals of a batch, as the host asks for them: fresh lists, which it takes apart."""
        key = tuple(map(str, options["uuids"])), tuple(options["cond_or_uncond"]), tuple(x.shape)
        place = (key, self.seen[key])
        self.seen[key] += 1
        if place not in self.residuals:
            self.residuals[place] = self.control.get_control(x, t, cond, count, options)
        found = self.residuals[place]
        return {name: list(values) for name, values in found.items()} if isinstance(found, dict) else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)


def remembering(branches: Sequence[Any], controls: dict[int, RememberedControl]) -> list[Any]:
    """`branches` whose ControlNets run once in an evaluation, however often the network does.

    controls: those of this evaluation by id of the host's own, filled here.
    """
    for remembered in controls.values():
        remembered.begin()

    def with_control(cond: dict[str, Any]) -> dict[str, Any]:
        control = cond.get("control")
        if control is None:
            return cond
        return {**cond, "control": controls.setdefault(id(control), RememberedControl(control))}

    return [branch and [with_control(cond) for cond in branch] for branch in branches]
