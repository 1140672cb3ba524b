"""The sites of one network, and how they are swapped while one pass runs.

A site has two swaps: one that stores what the host computes there, one that gives back what was stored. Every function
that is put into the host is made once a run, so that a compiled network is traced once for each of the two.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...fastercache_core.features.memory import Branch, Feature, Site
from ...fastercache_core.features.reuse import ReuseCache
from .compiler import unrecorded
from .families import ATTENTION, SPANS, Family, Stack

# What a compiled network must not be traced into: it stores tensors, and asks which pass runs.
HIDDEN = ("holds", "fits", "entered", "store", "recall", "begin_span", "end_span", "skip_span")

Forward = Callable[..., Any]
Swap = tuple[nn.Module, str, Forward]  # a module, the name of its method, what stands in its place
Swaps = tuple[list[Swap], list[Swap]]  # those that store, those that give back
Control = Mapping[str, list[Tensor | None]]


@dataclass(frozen=True)
class FeatureRequest:
    """What is asked of one pass.

    branches: identities of the chunks of the batch; kept: the same, None where features are not stored; reuse: take
    what is fresh from the cache; ahead: branches of this evaluation that run in other passes and will be stored; tiled:
    they may be of a part of the latent, another one than at the last evaluation.
    """

    branches: Sequence[Any]
    kept: Sequence[Any | None]
    reuse: bool
    ahead: Sequence[Any] = ()
    tiled: bool = False


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def network_lock(network: nn.Module) -> Any:
    """The lock to hold while `network` is looked at or swapped: a swapped network is of use to one thread alone."""
    with _locks_lock:
        return _locks.setdefault(network, threading.RLock())


class FeatureHooks:
    """The sites of the wanted kinds in one network, for one run."""

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        cache: ReuseCache | Promises,
        kinds: Iterable[str],
        compiled: bool = False,
    ) -> None:
        self.axis, self.compiled = family.batch_axis, compiled
        self.cache: ReuseCache | Promises | LastGiven = cache
        self._joint = any(entry.joint is not None for entry in family.attention)
        self.bases: dict[Site, list[Tensor]] = {}  # inputs of the spans that run
        self._request = FeatureRequest((), (), False)
        self._single: dict[Site, bool] = {}  # whether a site gives one tensor
        self._shapes: dict[tuple[Branch | None, Site], tuple[int, ...]] = {}  # of inputs
        for name in HIDDEN if compiled else ():
            setattr(self, name, torch.compiler.disable(getattr(self, name)))
        self._names = {id(module): block_of(name) for name, module in network.named_modules()}
        self._blocks: dict[Site, set[tuple[str, int]]] = {}
        self._sites = {kind: list(self._swaps(network, family, kind)) for kind in kinds}

    def options(self, transformer_options: Mapping[str, Any], reused: Collection[str]) -> Mapping[str, Any]:
        """The options of a pass in which the kinds `reused` come from the cache."""
        return skip_empty_attention(transformer_options) if "self" in reused and self._joint else transformer_options

    @contextmanager
    def running(self, request: FeatureRequest, reused: Collection[str], recorded: Collection[str]) -> Iterator[None]:
        """While open, sites of the kinds `reused` come from the cache, those of `recorded` are stored."""
        self._request = request
        swaps = [
            swap
            for kind, sites in self._sites.items()
            for record, reuse in sites
            for swap in (reuse if kind in reused else record if kind in recorded else ())
        ]
        try:
            with swapped(swaps):
                yield
        finally:
            self.bases.clear()

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """While open, sites give back at once what they gave last; it is stored in the cache as well."""
        cache, self.cache = self.cache, LastGiven(self.cache)
        try:
            yield
        finally:
            self.cache = cache

    def holds(self, *sites: Site) -> bool:
        """True when every one of `sites` can be recalled for the batch that is running."""
        return all(self.cache.holds(site, self._request.branches) for site in sites)

    def fits(self, site: Site, x: Tensor) -> bool:
        """True when `site` can be recalled, and its input `x` has the shape that it had then."""
        own = self._own_shape(x)
        return self.holds(site) and all(self._shapes.get((branch, site)) == own for branch in self._request.branches)

    def entered(self, site: Site, x: Tensor) -> None:
        """Note the input of `site`: other nodes may have the host compute it smaller for some evaluations."""
        self._shapes.update(dict.fromkeys(((branch, site) for branch in self._request.kept), self._own_shape(x)))

    def store(self, site: Site, output: Any) -> None:
        """Store what the host computed at `site`: a tensor, or a tuple of tensors and None."""
        self._single[site] = torch.is_tensor(output)
        feature = (output,) if self._single[site] else tuple(output)
        if self.axis is None:
            feature = tuple(t if t is None else t[None] for t in feature)
        with unrecorded():
            self.cache.store(site, self._request.kept, feature, self.axis or 0)

    def recall(self, site: Site) -> Any:
        """What the host would have computed at `site`, from the cache, in the form it was stored."""
        with unrecorded():
            feature = self.cache.recall(site, self._request.branches, self.axis or 0)
        if self.axis is None:
            feature = tuple(t if t is None else t[0] for t in feature)
        return feature[0] if self._single[site] else feature

    def begin_span(self, site: Site, streams: Iterable[Tensor]) -> None:
        """Copy the input of a run of blocks: the host may add to it in place."""
        self.bases.setdefault(site, [t.clone() for t in streams])

    def end_span(self, site: Site, output: Any) -> None:
        """Store what a run of blocks added to its input, if it began as it should."""
        base = self.bases.pop(site, None)
        if base is not None:
            self.store(site, _each(lambda out, b: None if out is None else out - b, output, base))

    def skip_span(self, site: Site) -> Any:
        """The output of a run of blocks, from its copied input and the cache."""
        base = self.bases.pop(site)
        return _each(lambda change, b: None if change is None else b + change, self.recall(site), base)

    def where(self, sites: Iterable[Site]) -> dict[str, dict[str, str]]:
        """The blocks that `sites` lie in, by kind: {kind: {list of blocks: "0-9 of 24"}}."""
        blocks: dict[str, set[tuple[str, int]]] = {}
        for kind, number, *_ in sites:
            blocks.setdefault(kind, set()).update(self._blocks[kind, number])
        return {kind: named(some, self._names.values()) for kind, some in blocks.items()}

    def _own_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of one branch's part of `x`."""
        return tuple(n // len(self._request.branches) if i == self.axis else n for i, n in enumerate(x.shape))

    def _swaps(self, network: nn.Module, family: Family, kind: str) -> Iterator[Swaps]:
        most, seen = self.cache.settings.blocks, set()
        for number, (make, *parts) in enumerate(_places(network, family, kind, most)):
            record, reuse = make(self, (kind, number), *parts)
            blocks = {block for module, *_ in (*record, *reuse) if (block := self._names[id(module)])}
            seen |= blocks
            if most is not None and kind in ATTENTION and len(seen) > most:
                return
            self._blocks[kind, number] = blocks
            yield self._traceable(record), self._traceable(reuse)

    def _traceable(self, swaps: list[Swap]) -> list[Swap]:
        # The swaps themselves are not traced, the host's code that they call is.
        if not self.compiled:
            return swaps
        return [(module, name, torch.compiler.disable(f, recursive=False)) for module, name, f in swaps]


class LastGiven:
    """Takes the place of a ReuseCache while a pass is repeated: gives back what every site gave in the pass before."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.given = cache, dict[Site, Feature]()

    def store(self, site: Site, branches: Sequence[Branch | None], feature: Feature, axis: int = 0) -> None:
        """Remember a copy of `feature`, and store it."""
        self.given[site] = tuple(None if t is None else t.clone() for t in feature)
        self.cache.store(site, branches, feature, axis)

    def holds(self, site: Site, branches: Sequence[Branch]) -> bool:
        """True when `site` gave something."""
        return site in self.given

    def recall(self, site: Site, branches: Sequence[Branch], axis: int = 0) -> Feature:
        """What `site` gave."""
        return self.given[site]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class Promises:
    """Takes the place of a ReuseCache in a dry run: promises room to the branches `ahead` for what would be stored."""

    def __init__(self, cache: ReuseCache, ahead: Sequence[Branch]) -> None:
        self.cache, self.ahead = cache, ahead

    def store(self, site: Site, branches: Sequence[Branch | None], feature: Feature, axis: int = 0) -> None:
        """Promise room to every branch for a slice of a `feature` of as many `branches`."""
        self.cache.promise(site, self.ahead, feature, len(branches), axis)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def skip_empty_attention(transformer_options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under which attention over no tokens returns no tokens instead of failing.

    Joint blocks whose modules are reused still call attention once, with nothing in it.
    """
    before = transformer_options.get("optimized_attention_override")

    def override(attention: Forward, *args: Any, **kwargs: Any) -> Any:
        query = args[0]
        if query.numel() == 0:
            return query
        return attention(*args, **kwargs) if before is None else before(attention, *args, **kwargs)

    return {**transformer_options, "optimized_attention_override": override}


def control_for(control: Control | None, network: Any, reused: Collection[str]) -> Control | None:
    """ControlNet residuals of a pass in which the kinds `reused` come from the cache: without those of the blocks that
    "deep" leaves out.

    The host takes them from the end of each list, one for every block in order: the caller's own lists stay whole.
    """
    if control is None or "deep" not in reused:
        return control and {name: list(values) for name, values in control.items()}
    outer, total = outer_blocks(network), len(network.output_blocks)
    runs: dict[str, Callable[[int], bool]] = {
        "input": lambda i: i < outer,
        "middle": lambda i: False,
        "output": lambda i: i >= total - outer,
    }
    return {
        name: [value if name not in runs or runs[name](len(values) - 1 - i) else None for i, value in enumerate(values)]
        for name, values in control.items()
    }


def outer_blocks(unet: Any) -> int:
    """How many input blocks a UNet has before its first downsampling; 0 when it has none."""
    blocks = enumerate(unet.input_blocks)
    return next((i for i, block in blocks if any(type(layer).__name__ == "Downsample" for layer in block)), 0)


def block_of(name: str) -> tuple[str, int] | None:
    """The list of blocks that a module lies in and the number of its block there, from its name; None for no list."""
    match = re.match(r"(\D*?)\.?[a-z_]*?(\d+)", name)
    return (match[1], int(match[2])) if match else None


def named(blocks: Collection[tuple[str, int]], every: Iterable[tuple[str, int] | None]) -> dict[str, str]:
    """What to call `blocks` (list, number) of `every` one: {list: "0-9, 12 of 24"}."""

    def numbers(path: str, some: Iterable[tuple[str, int] | None]) -> list[int]:
        return sorted({block[1] for block in some if block and block[0] == path})

    every = set(every)
    paths = sorted({path for path, _ in blocks})
    return {path: f"{ranges(numbers(path, blocks))} of {len(numbers(path, every))}" for path in paths}


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: "0-2, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _places(network: nn.Module, family: Family, kind: str, most: int | None = None) -> Iterator[tuple[Any, ...]]:
    """(site maker, what it needs) of every site of a kind, in the order they run. most: blocks of a span."""
    if kind in ATTENTION:
        yield from _attention(network, family, kind)
    elif kind in SPANS:
        for i, stack in enumerate(family.stacks):
            blocks = _blocks(_descend(network, stack.path))
            chosen = _span(blocks, kind, first=i == 0)
            chosen = chosen[-most:] if most and kind == "rear" else chosen[:most]
            if chosen:
                yield span_site, chosen, stack, _idle(network, stack, blocks, chosen)
    elif kind == "deep" and outer_blocks(network):
        yield deep_site, network
    elif kind == "branch":
        yield from _branches(network)


def _attention(network: nn.Module, family: Family, kind: str) -> Iterator[tuple[Any, ...]]:
    for name, block in network.named_modules():
        classes, lists = {c.__name__ for c in type(block).__mro__}, {"", *name.split(".")}
        for entry in family.attention:
            meant = entry.kind == kind and entry.block in classes and entry.inside in lists
            module = _descend(block, entry.path) if meant else None
            if module is not None and entry.joint is None:
                yield output_site, module
            elif module is not None:
                yield joint_site, [module, *(_descend(block, path) for path in entry.joint or ())]


def _blocks(stack: Any) -> list[nn.Module]:
    return list(stack.values() if hasattr(stack, "values") else stack)


def _span(blocks: list[nn.Module], kind: str, first: bool) -> list[nn.Module]:
    """The blocks of a span; the very first block of a network always runs."""
    half = (len(blocks) + 1) // 2
    begin = max(half, int(first)) if kind == "rear" else int(first)
    return blocks[begin : half if kind == "front" else len(blocks)]


def _idle(network: nn.Module, stack: Stack, blocks: list[nn.Module], chosen: list[nn.Module]) -> list[nn.Module]:
    """Blocks beside a stack that need not run where `chosen` of its `blocks` do not: nothing after uses them.

    They hand something on to one another, so that all that follow must be left out as well; what one adds after the
    last block stays.
    """
    places = _descend(network, stack.beside[1]) if stack.beside else None
    if not (stack.beside and places) or chosen[-1] is not blocks[-1] or len(blocks) - 1 in places:
        return []
    beside = _descend(network, stack.beside[0])
    return [beside[n] for i, n in places.items() if i >= len(blocks) - len(chosen)]


def _branches(unet: nn.Module) -> Iterator[tuple[Any, ...]]:
    for module in unet.modules():
        names = {c.__name__ for c in type(module).__mro__}
        if "ResBlock" in names and not module.updown:
            yield output_site, module.in_layers
        elif "SpatialTransformer" in names:
            yield span_site, [module], Stack(""), []


def output_site(hooks: FeatureHooks, site: Site, module: nn.Module) -> Swaps:
    """A module whose output is the feature.

    Where the host has it add a residual, that is inside the output, and belongs to this evaluation alone.
    """
    forward = module.forward
    names = list(inspect.signature(forward).parameters)

    def adds(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return dict(zip(names, args, strict=False), **kwargs).get("residual") is not None

    def record(*args: Any, **kwargs: Any) -> Any:
        if adds(args, kwargs):
            return forward(*args, **kwargs)
        hooks.entered(site, _first(args, kwargs))
        output = forward(*args, **kwargs)
        hooks.store(site, output)
        return output

    def reuse(*args: Any, **kwargs: Any) -> Any:
        reusable = not adds(args, kwargs) and hooks.fits(site, _first(args, kwargs))
        return hooks.recall(site) if reusable else forward(*args, **kwargs)

    return [(module, "forward", record)], [(module, "forward", reuse)]


def joint_site(hooks: FeatureHooks, site: Site, modules: Sequence[Any]) -> Swaps:
    """One attention over the tokens of several modules: reused, it runs over no tokens at all."""
    records: list[Swap] = []
    reuses: list[Swap] = []
    sites = [(*site, i) for i in range(len(modules))]
    outputs = [s for s, module in zip(sites, modules, strict=True) if not module.pre_only]
    for own, module in zip(sites, modules, strict=True):
        before, after = module.pre_attention, module.post_attention

        def record(x: Any, own: Site = own, after: Forward = after) -> Any:
            output = after(x)
            hooks.store(own, output)
            return output

        def reuse_before(x: Tensor, before: Forward = before) -> Any:
            return (x[:, :0],) * 3 if hooks.holds(*outputs) else before(x)

        def reuse_after(x: Any, own: Site = own, after: Forward = after) -> Any:
            return hooks.recall(own) if hooks.holds(*outputs) else after(x)

        reuses.append((module, "pre_attention", reuse_before))
        if not module.pre_only:  # the last context block feeds the attention and takes nothing back
            records.append((module, "post_attention", record))
            reuses.append((module, "post_attention", reuse_after))
    return records, reuses


def span_site(
    hooks: FeatureHooks, site: Site, blocks: list[nn.Module], stack: Stack, idle: Sequence[nn.Module]
) -> Swaps:
    """What a run of `blocks` of a stack adds to its input. Reused, only the last of them does anything.

    idle: blocks beside these that do nothing meanwhile; they give what is added to a block and what is handed on.
    """

    def rest(forward: Forward, handed_on: Any, *args: Any, **kwargs: Any) -> Any:
        return (handed_on, handed_on) if site in hooks.bases else forward(handed_on, *args, **kwargs)

    resting = [_forward(block, rest, block.forward) for block in idle]
    return _span_record(hooks, site, blocks, stack), [*_span_reuse(hooks, site, blocks, stack), *resting]


def _span_record(hooks: FeatureHooks, site: Site, blocks: list[nn.Module], stack: Stack) -> list[Swap]:
    """The host may add to what blocks return in place (ControlNet): the input is copied."""

    def enter(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        given = [_stream(key, args, kwargs) for key in stack.streams]
        hooks.begin_span(site, given)
        hooks.entered(site, given[0])
        return forward(*args, **kwargs)

    def leave(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hooks.end_span(site, output)
        return output

    first, last = blocks[0], blocks[-1]
    entering = around(_but_aside(stack, enter), getattr(first, stack.method))
    leaving = _but_aside(stack, leave)
    if first is last:
        return [(last, stack.method, around(leaving, entering))]
    return [(first, stack.method, entering), (last, stack.method, around(leaving, getattr(last, stack.method)))]


def _span_reuse(hooks: FeatureHooks, site: Site, blocks: list[nn.Module], stack: Stack) -> list[Swap]:
    """What the skipped blocks pass on is never looked at."""
    skipped = blocks[:-1]
    forwards = [getattr(block, stack.method) for block in blocks]

    def pass_on(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        given = [_stream(key, args, kwargs) for key in stack.streams]
        if site not in hooks.bases and not (forward is forwards[0] and hooks.fits(site, given[0])):
            return forward(*args, **kwargs)
        hooks.begin_span(site, given)
        return given[0] if len(given) == 1 else tuple(given)

    def skip(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        given = [_stream(key, args, kwargs) for key in stack.streams]
        if not skipped and hooks.fits(site, given[0]):
            hooks.begin_span(site, given)
        return hooks.skip_span(site) if site in hooks.bases else forward(*args, **kwargs)

    wrappers = [_but_aside(stack, wrapper) for wrapper in (*(pass_on for _ in skipped), skip)]
    return [(block, stack.method, around(w, f)) for block, w, f in zip(blocks, wrappers, forwards, strict=True)]


def _but_aside(stack: Stack, wrapper: Forward) -> Forward:
    """`wrapper`, but for calls that `stack` says always run as they are."""
    place = stack.aside
    if place is None:
        return wrapper

    def wrapped(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        alone = _stream(stack.streams[0], args, kwargs).shape[1] == args[place]
        return forward(*args, **kwargs) if alone else wrapper(forward, *args, **kwargs)

    return wrapped


def deep_site(hooks: FeatureHooks, site: Site, unet: Any) -> Swaps:
    """Everything in a UNet below its first downsampling: the way back up starts from the cache.

    Layers that are left out pass on no channels; the host joins them and finds nothing.
    """
    outer, total = outer_blocks(unet), len(unet.output_blocks)
    middle = [unet.middle_block] if unet.middle_block is not None else []
    inside = [*unet.input_blocks[outer:], *middle, *unet.output_blocks[: total - outer]]
    *skipped, last = [layer for block in inside for layer in block]
    forward = last.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hooks.store(site, output)
        return output

    def reuse(*args: Any, **kwargs: Any) -> Any:
        return hooks.recall(site) if hooks.holds(site) else forward(*args, **kwargs)

    def nothing(layer_forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return x[:, :0] if hooks.holds(site) else layer_forward(x, *args, **kwargs)

    nothings = [_forward(layer, nothing, layer.forward) for layer in skipped]
    return [(last, "forward", record)], [*nothings, (last, "forward", reuse)]


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module is called with first."""
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))


def _stream(key: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(key, tuple):
        argument, place = key
        return _stream(argument, args, kwargs)[place]
    return kwargs[key] if isinstance(key, str) else args[key]


def _each(function: Callable[[Any, Tensor], Any], output: Any, base: Sequence[Tensor]) -> Any:
    """`function` on every stream of an output (a tensor or a tuple) and its base, in the output's form."""
    if torch.is_tensor(output):
        return function(output, base[0])
    return tuple(function(out, b) for out, b in zip(output, base, strict=False))


def around(wrapper: Forward, forward: Forward) -> Forward:
    """`forward` as `wrapper` calls it: wrapper(forward, *args, **kwargs)."""
    return lambda *args, **kwargs: wrapper(forward, *args, **kwargs)


def _forward(module: nn.Module, wrapper: Forward, forward: Forward) -> Swap:
    return module, "forward", around(wrapper, forward)


@contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Set attributes on module instances, put the previous state back however the body ends."""
    missing = object()
    before = [(module, name, module.__dict__.get(name, missing)) for module, name, _ in swaps]
    try:
        for module, name, replacement in swaps:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, old in reversed(before):
            if old is missing:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, old)


def _descend(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
