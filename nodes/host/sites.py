"""The sites of one network, and how they are swapped while one evaluation runs.

A site has two swaps: one that stores what the host computes there, one that gives back what was
stored. Every function that is put into the host is made once a run, so that a compiled network is
traced once for each of the two.
"""
import re
from contextlib import contextmanager

import torch

from .families import ATTENTION, SPANS


# What a compiled network must not be traced into: it keeps tensors, and asks who is running.
HIDDEN = ("holds", "fits", "entered", "store", "recall", "begin_span", "end_span", "jump_span")


class FeatureSwap:
    """The sites of the wanted kinds in one network, for one run.

    cache: a ReuseCache. While `running`, `branches` names the chunks of the batch, and `kept` those
    of them whose features are stored (None: not stored).
    """

    def __init__(self, network, family, cache, kinds, compiled=False):
        self.cache, self.axis, self.compiled = cache, family.batch_axis, compiled
        self.branches = self.kept = ()
        self.single, self.bases, self.shapes = {}, {}, {}
        for name in HIDDEN if compiled else ():
            setattr(self, name, torch.compiler.disable(getattr(self, name)))
        self.names = {id(module): block_of(name) for name, module in network.named_modules()}
        self.blocks = {}
        self.sites = {kind: list(self._sites(network, family, kind)) for kind in kinds}

    def options(self, transformer_options, reused):
        """The options of a pass in which the kinds `reused` come from the cache."""
        return skip_empty_attention(transformer_options) if "self" in reused else transformer_options

    @contextmanager
    def running(self, branches, kept, reused, recorded):
        """While open, sites of the kinds `reused` come from the cache, those of `recorded` are stored."""
        self.branches, self.kept = branches, kept
        swaps = [swap for kind, sites in self.sites.items() for record, reuse in sites
                 for swap in (reuse if kind in reused else record if kind in recorded else ())]
        try:
            with _swapped(swaps):
                yield
        finally:
            self.bases.clear()

    def holds(self, *sites):
        """True when every one of `sites` can be recalled for the batch that is running."""
        return all(self.cache.holds(site, self.branches) for site in sites)

    def fits(self, site, x):
        """True when `site` can be recalled, and its input `x` has the shape that it had then."""
        own = self._own_shape(x)
        return self.holds(site) and all(self.shapes.get((branch, site)) == own for branch in self.branches)

    def entered(self, site, x):
        """Note the input of `site`: other nodes may have the host compute it smaller for some evaluations."""
        self.shapes.update(dict.fromkeys(((branch, site) for branch in self.kept), self._own_shape(x)))

    def store(self, site, output):
        """Store what the host computed at `site`: a tensor, or a tuple of tensors and None."""
        self.single[site] = torch.is_tensor(output)
        self.cache.store(site, self.kept, (output,) if self.single[site] else tuple(output), self.axis)

    def recall(self, site):
        """What the host would have computed at `site`, from the cache, in the form it was stored."""
        feature = self.cache.recall(site, self.branches, self.axis)
        return feature[0] if self.single[site] else feature

    def begin_span(self, site, streams):
        """Keep the input of a run of blocks: the host may add to it in place."""
        self.bases.setdefault(site, [t.clone() for t in streams])

    def end_span(self, site, output):
        """Store what a run of blocks added to its input, if it began as it should."""
        base = self.bases.pop(site, None)
        if base is not None:
            self.store(site, _each(lambda out, b: None if out is None else out - b, output, base))

    def jump_span(self, site):
        """The output of a run of blocks, from its kept input and the cache."""
        return _each(lambda change, b: None if change is None else b + change, self.recall(site),
                     self.bases.pop(site))

    def where(self, sites):
        """The blocks that `sites` lie in, by kind: {kind: {list of blocks: "0-9 of 24"}}."""
        found = {}
        for kind, *place in sites:
            found.setdefault(kind, set()).update(self.blocks[kind, place[0]])
        return {kind: named(blocks, self.names.values()) for kind, blocks in found.items()}

    def _own_shape(self, x):
        """The shape of one branch's part of `x`."""
        return tuple(n // len(self.branches) if i == self.axis else n for i, n in enumerate(x.shape))

    def _sites(self, network, family, kind):
        for number, (make, *parts) in enumerate(_places(network, family, kind)):
            record, reuse = make(self, (kind, number), *parts)
            self.blocks[kind, number] = {self.names[id(module)] for module, *_ in (*record, *reuse)} - {None}
            yield self._traceable(record), self._traceable(reuse)

    def _traceable(self, swaps):
        # The swaps themselves are not traced, the host's code that they call is.
        if not self.compiled:
            return swaps
        return [(module, name, torch.compiler.disable(f, recursive=False)) for module, name, f in swaps]


def skip_empty_attention(transformer_options):
    """Options under which attention over no tokens returns no tokens instead of failing.

    Joint blocks whose modules are reused still call attention once, with nothing in it.
    """
    before = transformer_options.get("optimized_attention_override")

    def override(func, *args, **kwargs):
        query = args[0]
        if query.numel() == 0:
            return query
        return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)

    return {**transformer_options, "optimized_attention_override": override}


def control_of_kept_blocks(control, network):
    """ControlNet residuals of a UNet without those of the blocks that "deep" leaves out.

    The host takes them from the end of each list, one for every block in order.
    """
    if control is None:
        return None
    kept, total = kept_blocks(network), len(network.output_blocks)
    dropped = {"input": lambda i: i >= kept, "middle": lambda i: True, "output": lambda i: i < total - kept}
    return {name: [None if name in dropped and dropped[name](len(values) - 1 - i) else value
                   for i, value in enumerate(values)] for name, values in control.items()}


def kept_blocks(unet):
    """How many input blocks a UNet has before its first downsampling; 0 when it has none."""
    return next((i for i, block in enumerate(unet.input_blocks)
                 if any(type(layer).__name__ == "Downsample" for layer in block)), 0)


def block_of(name):
    """The list of blocks that a module lies in and the number of its block there, from its name; None for no list."""
    found = re.match(r"(\D*?)\.?[a-z_]*?(\d+)", name)
    return (found[1], int(found[2])) if found else None


def named(blocks, every):
    """What to call `blocks` {(list, number)} of `every` one: {list: "0-9, 12 of 24"}."""
    numbers = lambda path, some: sorted({block[1] for block in some if block and block[0] == path})
    return {path: f"{ranges(numbers(path, blocks))} of {len(numbers(path, every))}"
            for path in sorted({path for path, _ in blocks})}


def ranges(numbers):
    """Sorted numbers in short: "0-2, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def _places(network, family, kind):
    """(site maker, what it needs) of every site of a kind, in the order they run."""
    if kind in ATTENTION:
        yield from _attention(network, family, kind)
    elif kind in SPANS:
        for i, stack in enumerate(family.stacks):
            blocks = _blocks(_descend(network, stack.path))
            chosen = _span(blocks, kind, first=i == 0)
            if chosen:
                yield span_site, chosen, stack.streams, _idle(network, stack.beside, blocks, chosen)
    elif kind == "deep" and kept_blocks(network):
        yield deep_site, network
    elif kind == "branch":
        yield from _branches(network)


def _attention(network, family, kind):
    for name, block in network.named_modules():
        classes, lists = {c.__name__ for c in type(block).__mro__}, {"", *name.split(".")}
        for entry in family.attention:
            meant = entry.kind == kind and entry.block in classes and entry.inside in lists
            module = _descend(block, entry.path) if meant else None
            if module is not None and entry.joint is None:
                yield output_site, module
            elif module is not None:
                yield joint_site, [module, *(_descend(block, path) for path in entry.joint)]


def _blocks(stack):
    return list(stack.values() if hasattr(stack, "values") else stack)


def _span(blocks, kind, first):
    """The blocks of a span; the very first block of a network always runs."""
    half = (len(blocks) + 1) // 2
    begin = {"rear": max(half, int(first))}.get(kind, int(first))
    return blocks[begin:half if kind == "front" else len(blocks)]


def _idle(network, beside, blocks, chosen):
    """Blocks beside a stack that need not run where `chosen` of its `blocks` do not: nothing after uses them.

    They hand something on to one another, so that all that follow must be left out as well; what one adds after the
    last block stays.
    """
    places = _descend(network, beside[1]) if beside else None
    if not places or chosen[-1] is not blocks[-1] or len(blocks) - 1 in places:
        return []
    return [_descend(network, beside[0])[n] for i, n in places.items() if i >= len(blocks) - len(chosen)]


def _branches(unet):
    for module in unet.modules():
        names = {c.__name__ for c in type(module).__mro__}
        if "ResBlock" in names and not module.updown:
            yield output_site, module.in_layers
        elif "SpatialTransformer" in names:
            yield span_site, [module], (0,), []


def output_site(swap, site, module):
    """A module whose output is the feature."""
    forward = module.forward

    def record(*args, **kwargs):
        swap.entered(site, _first(args, kwargs))
        output = forward(*args, **kwargs)
        swap.store(site, output)
        return output

    def reuse(*args, **kwargs):
        return swap.recall(site) if swap.fits(site, _first(args, kwargs)) else forward(*args, **kwargs)

    return [(module, "forward", record)], [(module, "forward", reuse)]


def joint_site(swap, site, modules):
    """One attention over the tokens of several modules: reused, it runs over no tokens at all."""
    records, reuses = [], []
    sites = [(*site, i) for i in range(len(modules))]
    outputs = [s for s, module in zip(sites, modules) if not module.pre_only]
    for own, module in zip(sites, modules):
        before, after = module.pre_attention, module.post_attention

        def record(x, own=own, after=after):
            output = after(x)
            swap.store(own, output)
            return output

        def reuse_before(x, before=before):
            return (x[:, :0],) * 3 if swap.holds(*outputs) else before(x)

        def reuse_after(x, own=own, after=after):
            return swap.recall(own) if swap.holds(*outputs) else after(x)

        reuses.append((module, "pre_attention", reuse_before))
        if not module.pre_only:  # the last context block feeds the attention and takes nothing back
            records.append((module, "post_attention", record))
            reuses.append((module, "post_attention", reuse_after))
    return records, reuses


def span_site(swap, site, blocks, streams, idle):
    """What a run of blocks adds to its input. Reused, only the last of them does anything.

    idle: blocks beside these that do nothing meanwhile; they give what is added to a block and what is handed on.
    The host may add to what blocks return in place (ControlNet): the input is copied, and what the
    skipped blocks pass on is never looked at.
    """
    def enter(forward, *args, **kwargs):
        given = _streams(streams, args, kwargs)
        swap.begin_span(site, given)
        swap.entered(site, given[0])
        return forward(*args, **kwargs)

    def leave(forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        swap.end_span(site, output)
        return output

    def pass_on(forward, *args, **kwargs):
        given = _streams(streams, args, kwargs)
        if site not in swap.bases and not (forward is forwards[0] and swap.fits(site, given[0])):
            return forward(*args, **kwargs)
        swap.begin_span(site, given)
        return given[0] if len(given) == 1 else tuple(given)

    def jump(forward, *args, **kwargs):
        given = _streams(streams, args, kwargs)
        if len(blocks) == 1 and swap.fits(site, given[0]):
            swap.begin_span(site, given)
        return swap.jump_span(site) if site in swap.bases else forward(*args, **kwargs)

    def rest(forward, handed_on, *args, **kwargs):
        return (handed_on, handed_on) if site in swap.bases else forward(handed_on, *args, **kwargs)

    forwards = [block.forward for block in blocks]
    entering = _around(enter, forwards[0])
    if len(blocks) == 1:
        record = [(blocks[0], "forward", _around(leave, entering))]
    else:
        record = [(blocks[0], "forward", entering), (blocks[-1], "forward", _around(leave, forwards[-1]))]
    passing = [(block, "forward", _around(pass_on, forward)) for block, forward in zip(blocks[:-1], forwards)]
    resting = [(block, "forward", _around(rest, block.forward)) for block in idle]
    return record, [*passing, *resting, (blocks[-1], "forward", _around(jump, forwards[-1]))]


def deep_site(swap, site, unet):
    """Everything in a UNet below its first downsampling: the way back up starts from the cache.

    Layers that are left out pass on no channels; the host joins them and finds nothing.
    """
    kept, total = kept_blocks(unet), len(unet.output_blocks)
    inside = [*unet.input_blocks[kept:], *([unet.middle_block] if unet.middle_block is not None else []),
              *unet.output_blocks[:total - kept]]
    *skipped, last = [layer for block in inside for layer in block]
    forward = last.forward

    def record(*args, **kwargs):
        output = forward(*args, **kwargs)
        swap.store(site, output)
        return output

    def reuse(*args, **kwargs):
        return swap.recall(site) if swap.holds(site) else forward(*args, **kwargs)

    def nothing(layer_forward, x, *args, **kwargs):
        return x[:, :0] if swap.holds(site) else layer_forward(x, *args, **kwargs)

    nothings = [(layer, "forward", _around(nothing, layer.forward)) for layer in skipped]
    return [(last, "forward", record)], [*nothings, (last, "forward", reuse)]


def _first(args, kwargs):
    """The tensor that a module is called with first."""
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))


def _streams(streams, args, kwargs):
    return [_stream(key, args, kwargs) for key in streams]


def _stream(key, args, kwargs):
    if isinstance(key, tuple):
        argument, place = key
        return _stream(argument, args, kwargs)[place]
    return kwargs[key] if isinstance(key, str) else args[key]


def _each(function, output, base):
    """`function` on every stream of an output (a tensor or a tuple) and its base, in the output's form."""
    if torch.is_tensor(output):
        return function(output, base[0])
    return tuple(function(out, b) for out, b in zip(output, base))


def _around(wrapper, forward):
    return lambda *args, **kwargs: wrapper(forward, *args, **kwargs)


@contextmanager
def _swapped(swaps):
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


def _descend(module, path):
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
