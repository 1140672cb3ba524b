"""What the host fuses into attention: a residual inside its output (0.39), a kernel of the module's own (0.38)."""

import comfy.ldm.modules.attention as host_attention
import comfy.ops
import pytest
import torch
from fastercache_pack.nodes.host import families
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import ACTIONS, ALL_COMPUTED, STILL, reusing, told
from support.runs import actions, relative
from support.tiny import SPECS, sample

WIDTH, HEADS, BLOCKS = 32, 4, 2
CHANNELS, CONTEXT = SPECS["sd15"]["lat"][0], SPECS["sd15"]["ctx"][1]
Linear = comfy.ops.disable_weight_init.Linear


class Container:
    """One of the host's: it is empty once its tensor was taken."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


class ComfyAttention(torch.nn.Module):
    """By this class the host tells that a module's weights ask for a kernel of their own."""

    def __init__(self):
        super().__init__()
        self.function = None


def of_host(function, containers=None):
    """`function` called as the host calls attention: an override takes its place, and the module's own kernel's."""

    def attention(*args, **kwargs):
        preferred = kwargs.pop("preferred_attention", None)
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        contained = isinstance(args[0], Container)
        inside = kwargs.pop("_inside_attn_wrapper", False)
        if not inside and override is not None:
            if contained and hasattr(override, "container_function"):
                return override.container_function(*args, _inside_attn_wrapper=True, **kwargs)
            return override(function, *opened(args), _inside_attn_wrapper=True, **kwargs)
        if not inside and preferred is not None and preferred.function is not None:
            return preferred.function(*args, _inside_attn_wrapper=True, **kwargs)
        if contained and containers is not None:
            return containers(*args, **kwargs)
        return function(*opened(args), **kwargs)

    return attention


def opened(args):
    return [a.take() if isinstance(a, Container) else a for a in args]


def exact(q, k, v, heads, residual=None, **_):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return out if residual is None else residual + out


def other(factor):
    """A kernel that gives something else."""
    return lambda q, k, v, heads, **options: exact(*(factor * t for t in opened([q, k, v])), heads, **options)


KERNEL = of_host(other(0.9), other(0.8))  # three kernels: without containers, with them, and the host's own
PLAIN = of_host(exact)


class Own(torch.nn.Module):
    """A transformer with two attentions a block, each with a module by which it may have a kernel of its own.

    fused: the residual is added by the attention.
    """

    def __init__(self, contained, own, fused=False):
        super().__init__()
        self.dtype, self.contained, self.fused, self.ran = torch.float32, contained, fused, 0
        self.into, self.out, self.time = Linear(CHANNELS, WIDTH), Linear(WIDTH, CHANNELS), Linear(1, WIDTH)
        self.own = torch.nn.ModuleList(Linear(WIDTH, 3 * WIDTH) for _ in range(BLOCKS))
        self.query = torch.nn.ModuleList(Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.prompt = torch.nn.ModuleList(Linear(CONTEXT, 2 * WIDTH) for _ in range(BLOCKS))
        self.kernels = torch.nn.ModuleList(ComfyAttention() for _ in range(2 * BLOCKS))
        for kernel in self.kernels[:own]:
            kernel.function = self.kernel
        seeded(self)

    def kernel(self, *args, **kwargs):
        self.ran += 1
        return KERNEL(*args, **kwargs)

    def attend(self, number, tokens, q, k, v, options):
        given = [Container(t) if self.contained else t for t in (q, k, v)]
        kernel = self.kernels[number]
        if self.fused:
            return host_attention.optimized_attention(
                *given, HEADS, preferred_attention=kernel, transformer_options=options, residual=tokens
            )
        return tokens + host_attention.optimized_attention(
            *given, HEADS, preferred_attention=kernel, transformer_options=options
        )

    def forward(self, x, timesteps, context=None, transformer_options=None, **kwargs):
        tokens = self.into(x.flatten(2).mT) + self.time(timesteps[:, None] / 1000)[:, None]
        for i in range(BLOCKS):
            tokens = self.attend(2 * i, tokens, *self.own[i](tokens).chunk(3, -1), transformer_options)
            keys = self.prompt[i](context).chunk(2, -1)
            tokens = self.attend(2 * i + 1, tokens, self.query[i](tokens), *keys, transformer_options)
        return self.out(tokens).mT.unflatten(2, x.shape[2:])


def seeded(network):
    generator = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5


class Attending(torch.nn.Module):
    """An attention that may add a residual in its own last layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.ran = Linear(WIDTH, 3 * WIDTH), 0

    def forward(self, x, options, residual=None, residual_scale=None):
        self.ran += 1
        out = PLAIN(*self.qkv(x).chunk(3, -1), HEADS, transformer_options=options)
        return out if residual is None else torch.addcmul(residual, out, residual_scale)


class FusedBlock(torch.nn.Module):
    """Adds what it attends to by itself, or has the attention add it: by name, or by place."""

    def __init__(self, way):
        super().__init__()
        self.attn, self.way = Attending(), way

    def forward(self, x, gate, options):
        if self.way == "by name":
            return self.attn(x, options, residual=x, residual_scale=gate)
        if self.way == "by place":
            return self.attn(x, options, x, gate)
        return torch.addcmul(x, self.attn(x, options), gate)


class Fused(torch.nn.Module):
    """A transformer with a block for each of `ways`."""

    def __init__(self, ways):
        super().__init__()
        self.dtype = torch.float32
        self.into, self.out, self.time = Linear(CHANNELS, WIDTH), Linear(WIDTH, CHANNELS), Linear(1, WIDTH)
        self.blocks = torch.nn.ModuleList(FusedBlock(way) for way in ways)
        seeded(self)

    def forward(self, x, timesteps, context=None, transformer_options=None, **kwargs):
        time = self.time(timesteps[:, None] / 1000)[:, None]
        tokens = self.into(x.flatten(2).mT) + time
        for block in self.blocks:
            tokens = block(tokens, torch.sigmoid(time), transformer_options)
        return self.out(tokens).mT.unflatten(2, x.shape[2:])


@pytest.fixture
def standing_in(tiny_models, monkeypatch):
    """Makes a MODEL of a network of the tests' own. default: the attention of the host."""
    patcher = tiny_models("sd15")
    theirs = patcher.model.diffusion_model

    def make(network, default=PLAIN):
        monkeypatch.setattr(host_attention, "optimized_attention", default)
        patcher.model.diffusion_model = network
        return patcher.clone()

    yield make
    patcher.model.diffusion_model = theirs


@pytest.fixture
def family(monkeypatch):
    """An entry for Fused."""
    entry = families.Family(
        "Fused",
        (f"{Fused.__module__}.Fused",),
        (families.Attention("FusedBlock", "attn"),),
        (families.Stack("blocks"),),
    )
    monkeypatch.setattr(families, "FAMILIES", (entry,))


class Opening:
    """Another node's override that takes containers."""

    def __call__(self, attention, *args, **kwargs):
        return attention(*args, **kwargs)

    def container_function(self, *args, **kwargs):
        return other(0.7)(*args, **kwargs)


OTHERS = {
    "none": None,
    "an override": lambda attention, *args, **kwargs: other(0.6)(*args, **kwargs),
    "one of containers": Opening(),
}
KERNELS = {"every module's": 2 * BLOCKS, "some module's": 1, "the host's": 0}


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("contained", [True, False], ids=["containers", "tensors"])
@pytest.mark.parametrize("own", KERNELS)
@pytest.mark.parametrize("default", [PLAIN, KERNEL], ids=["exact", "another"])
def test_storing_leaves_every_kernel_as_it_is(standing_in, own, contained, default, others):
    """To the bit, where kernels differ from each other by more than that."""
    model = standing_in(Own(contained, KERNELS[own]), default)
    if OTHERS[others]:
        model.model_options["transformer_options"]["optimized_attention_override"] = OTHERS[others]
    theirs = sample(model, "sd15", steps=4)
    model = attach(model, reusing("self", "cross", every=1))
    assert torch.equal(sample(model, "sd15", steps=4), theirs)
    alone = KERNELS[own] if KERNELS[own] and not OTHERS[others] else 2 * BLOCKS
    assert last_report(model)["run"]["features"]["sites"] == alone


def test_the_kernels_differ(standing_in):
    pictures = [sample(standing_in(Own(False, own)), "sd15", steps=4) for own in (0, 1, 2 * BLOCKS)]
    pictures.append(sample(standing_in(Own(True, 2 * BLOCKS)), "sd15", steps=4))
    assert all(relative(a, b) > 1e-4 for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize("contained", [True, False], ids=["containers", "tensors"])
@pytest.mark.parametrize("own", KERNELS)
def test_attention_with_a_kernel_of_its_own_is_reused(standing_in, own, contained):
    model = standing_in(Own(contained, KERNELS[own]), KERNEL)
    theirs = sample(model, "sd15", sigmas=STILL)
    model = attach(model, reusing("self", "cross"))
    network = model.model.diffusion_model
    network.ran = 0
    assert relative(sample(model, "sd15", sigmas=STILL), theirs) < 1e-4
    assert actions(model) == ACTIONS
    assert network.ran == KERNELS[own] * ACTIONS.count("computed")


def test_an_attention_that_adds_the_residual_itself_always_runs(standing_in):
    model = standing_in(Own(True, 2 * BLOCKS, fused=True))
    theirs = sample(model, "sd15")
    model = attach(model, reusing("self", "cross"))
    assert torch.equal(sample(model, "sd15"), theirs)
    assert {*actions(model)} == {"computed"} and "no self or cross feature was found" in told(model)


@pytest.mark.parametrize("way", ["by name", "by place"])
def test_a_module_whose_output_holds_the_residual_always_runs(standing_in, family, way):
    """It is that of another evaluation when the output is reused."""
    model = standing_in(Fused([way] * 3))
    theirs = sample(model, "sd15", sigmas=STILL)
    model = attach(model, reusing("self"))
    assert torch.equal(sample(model, "sd15", sigmas=STILL), theirs)
    assert actions(model) == ALL_COMPUTED and "no self feature was found" in told(model)


def test_the_others_of_that_model_are_reused(standing_in, family):
    model = standing_in(Fused(["outside", "by name", "outside", "by place"]))
    theirs = sample(model, "sd15", sigmas=STILL)
    blocks = model.model.diffusion_model.blocks
    for block in blocks:
        block.attn.ran = 0
    model = attach(model, reusing("self"))
    assert relative(sample(model, "sd15", sigmas=STILL), theirs) < 1e-4
    assert actions(model) == ACTIONS and last_report(model)["run"]["features"]["sites"] == 2
    computed = ACTIONS.count("computed")
    assert [block.attn.ran for block in blocks] == [computed, len(ACTIONS), computed, len(ACTIONS)]


@pytest.mark.parametrize("kind", ["front", "stack"])
def test_blocks_are_reused_whatever_they_fuse(standing_in, family, kind):
    """What a run of blocks adds to its input holds no residual."""
    model = standing_in(Fused(["by name"] * 4))
    theirs = sample(model, "sd15", sigmas=STILL)
    model = attach(model, reusing(kind))
    assert relative(sample(model, "sd15", sigmas=STILL), theirs) < 1e-4
    assert actions(model) == ACTIONS
