"""Attention modules of each model family, and how they are swapped while one evaluation runs.

A family is one entry of data. Its attention outputs are taken after the output projection and
before gate and residual (FasterCache section 3.1).
"""
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionFamily:
    """Where a family's attention lives.

    model: full class name of the diffusion model. block: class name of the blocks that hold the
    attention modules. modules: their paths inside a block. joint: False when a module runs its
    whole attention in `forward`; True when the block calls `pre_attention` and `post_attention`
    of several modules around one attention over all their tokens.
    """
    name: str
    model: str
    block: str
    modules: tuple
    joint: bool = False


FAMILIES = (
    AttentionFamily("SD UNet", "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "BasicTransformerBlock", ("attn1",)),
    AttentionFamily("MMDiT", "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT",
                    "JointBlock", ("x_block.attn", "context_block.attn", "x_block.attn2"), joint=True),
)


def find_family(diffusion_model):
    """The entry for a diffusion model or any class it derives from, None when there is none."""
    bases = {f"{c.__module__}.{c.__qualname__}" for c in type(diffusion_model).__mro__}
    return next((family for family in FAMILIES if family.model in bases), None)


def attention_modules(diffusion_model, family):
    """Every attention module of the family in this network, in the order they run."""
    blocks = (m for m in diffusion_model.modules() if type(m).__name__ == family.block)
    found = (_descend(block, path) for block in blocks for path in family.modules)
    return [module for module in found if module is not None]


class AttentionSwap:
    """The attention modules of one network with their replacements for one run.

    cache: a ReuseCache. `branches` names the chunks of the batch that is running.
    """

    def __init__(self, diffusion_model, family, cache):
        self.cache = cache
        self.branches = ()
        self.modules = attention_modules(diffusion_model, family)
        make_record, make_reuse = (_record_joint, _reuse_joint) if family.joint else (_record, _reuse)
        self.record_swaps = [s for i, m in enumerate(self.modules) for s in make_record(self, i, m)]
        self.reuse_swaps = [s for i, m in enumerate(self.modules) for s in make_reuse(self, i, m)]

    @contextmanager
    def recording(self, branches):
        """While open, every attention output is stored for its branch (None: not stored)."""
        self.branches = branches
        with _swapped(self.record_swaps):
            yield

    @contextmanager
    def reusing(self, branches):
        """While open, every attention output comes from the cache and no attention runs."""
        self.branches = branches
        with _swapped(self.reuse_swaps):
            yield


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


def _record(swap, site, module):
    forward = module.forward

    def record(*args, **kwargs):
        output = forward(*args, **kwargs)
        swap.cache.store(site, swap.branches, output)
        return output

    return [(module, "forward", record)]


def _reuse(swap, site, module):
    return [(module, "forward", lambda *args, **kwargs: swap.cache.recall(site, swap.branches))]


def _record_joint(swap, site, module):
    if module.pre_only:  # the last context block feeds the attention and takes nothing back
        return []
    post_attention = module.post_attention

    def record(x):
        output = post_attention(x)
        swap.cache.store(site, swap.branches, output)
        return output

    return [(module, "post_attention", record)]


def _reuse_joint(swap, site, module):
    swaps = [(module, "pre_attention", lambda x: (x[:, :0],) * 3)]
    if not module.pre_only:
        swaps.append((module, "post_attention", lambda x: swap.cache.recall(site, swap.branches)))
    return swaps


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
        for module, name, old in before:
            if old is missing:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, old)


def _descend(module, path):
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
