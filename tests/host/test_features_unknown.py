"""Feature reuse on models that no family entry matches: in blocks that are found as the model runs, or else at the
host's hook for attention."""

import gc
import weakref

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from fastercache_pack.fastercache_core import messages
from fastercache_pack.nodes.host import dry_run, families
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import (
    ACTIONS,
    ALL_COMPUTED,
    BLOCKS,
    SPANS,
    STACKED,
    STILL,
    Backend,
    chosen_by_node,
    compiled,
    host_picture,
    reused_as_computed,
    reusing,
    shuffled_batches,
    still_around,
    told,
)
from support.runs import actions, relative
from support.tiny import SPECS, sample

WIDTH, HEADS, DEPTH = 32, 4, 2


class Own(torch.nn.Module):
    """A small transformer of nobody's: each block attends to the latent's own tokens, then to the prompt's.

    hands: whether it hands the host's options to attention. ways(options): its blocks in the order they run.
    """

    def __init__(self, channels, context, hands=True, ways=lambda options: range(DEPTH)):
        super().__init__()
        linear = comfy.ops.disable_weight_init.Linear
        self.dtype, self.hands, self.ways = torch.float32, hands, ways
        self.into, self.out = linear(channels, WIDTH), linear(WIDTH, channels)
        self.time = linear(1, WIDTH)
        self.own = torch.nn.ModuleList(linear(WIDTH, 3 * WIDTH) for _ in range(DEPTH))
        self.query = torch.nn.ModuleList(linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.prompt = torch.nn.ModuleList(linear(context, 2 * WIDTH) for _ in range(DEPTH))
        generator = torch.Generator().manual_seed(4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def forward(self, x, timesteps, context=None, transformer_options=None, **kwargs):
        height, width = x.shape[2:]
        tokens = self.into(x.flatten(2).mT) + self.time(timesteps[:, None] / 1000)[:, None]
        given = {"transformer_options": transformer_options} if self.hands else {}
        for i in self.ways(transformer_options):
            tokens = tokens + optimized_attention(*self.own[i](tokens).chunk(3, -1), HEADS, **given)
            tokens += optimized_attention(self.query[i](tokens), *self.prompt[i](context).chunk(2, -1), HEADS, **given)
        return self.out(tokens).mT.unflatten(2, (height, width))


@pytest.fixture
def own(tiny_models):
    """Makes a MODEL of the class Own, and a list of the attention that runs: another node's hook writes it."""
    patcher = tiny_models("sd15")
    theirs = patcher.model.diffusion_model

    def make(**options):
        patcher.model.diffusion_model = Own(SPECS["sd15"]["lat"][0], SPECS["sd15"]["ctx"][1], **options)
        model, ran = patcher.clone(), []

        def hook(attention, *args, **kwargs):
            ran.append(1)
            return attention(*args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = hook
        return model, ran

    yield make
    patcher.model.diffusion_model = theirs


@pytest.mark.parametrize("kinds", [("self",), ("cross",), ("self", "cross")])
def test_attention_that_is_reused_does_not_run_and_is_what_would_have_been_computed(own, monkeypatch, kinds):
    """For two branches and two latents that differ, batched anyhow; other nodes' hooks stay where attention runs."""
    model, ran = own()
    theirs = sample(model, "sd15", sigmas=STILL, batch=2)
    every = len(ran)
    assert every == len(ACTIONS) * DEPTH * 2
    alone = sample(model, "sd15", sigmas=STILL, batch=2, cfg=1.0)
    assert relative(alone, theirs) > 0.01 and relative(theirs[:1], theirs[1:]) > 0.01
    model, ran = own()
    model = attach(model, reusing(*kinds))
    held = sample(model, "sd15", sigmas=STILL, batch=2)
    assert actions(model) == ACTIONS, told(model)
    assert len(ran) == every - ACTIONS.count("reused") * DEPTH * len(kinds)
    assert relative(held, theirs) < 1e-4
    assert messages.unknown_family("Own", [], False, True) in told(model)
    assert last_report(model)["run"]["features"]["sites"] == DEPTH * len(kinds)
    shuffled_batches(monkeypatch)
    assert relative(sample(model, "sd15", sigmas=STILL, batch=2), theirs) < 1e-4


def test_storing_changes_nothing(own):
    model, _ = own()
    theirs = sample(model, "sd15", sigmas=STILL)
    model = attach(own()[0], reusing("self", "cross", every=1))
    assert torch.equal(sample(model, "sd15", sigmas=STILL), theirs)
    assert last_report(model)["run"]["features"]["sites"] == DEPTH * 2


def test_depths_that_need_blocks_become_attention(own):
    model = attach(own()[0], reusing("stack"))
    sample(model, "sd15", sigmas=STILL)
    assert actions(model) == ACTIONS
    assert messages.instead("Own", "stack", "self") in told(model)


def test_where_the_model_does_not_hand_on_the_hook_everything_runs_and_that_is_said(own):
    model, _ = own(hands=False)
    theirs = sample(model, "sd15", sigmas=STILL)
    model = attach(own(hands=False)[0], reusing("self"))
    assert torch.equal(sample(model, "sd15", sigmas=STILL), theirs)
    assert actions(model) == ALL_COMPUTED and "no self feature was found in this run" in told(model)
    assert messages.unknown_family("Own", [], False, False) in told(model)


def test_where_nothing_can_be_reused_nothing_is_said_to_be_saved(own):
    model = attach(own(hands=False)[0], chosen_by_node())
    sample(model, "sd15", steps=8)
    assert "reused" not in actions(model) and "nothing is reused" in told(model)
    assert "its attention cannot be skipped either" in told(model) and "saves most" not in told(model)


@pytest.mark.parametrize("late", [range(1), [1, 0, 1], [0]], ids=str)
def test_a_pass_with_other_calls_than_were_recorded_is_computed(own, late):
    """Fewer or more of them: nothing that was stored before is put into it, and it is the host's own."""
    border = float(own()[0].get_model_object("model_sampling").percent_to_sigma(0.5))
    ways = lambda options: range(DEPTH) if options["sigmas"][0] > border else late
    model, _ = own(ways=ways)
    sigmas = still_around(model, 0.5)
    theirs = sample(model, "sd15", sigmas=sigmas)
    model = attach(own(ways=ways)[0], reusing("self", "cross", every=6))
    result = sample(model, "sd15", sigmas=sigmas)
    assert actions(model) == [
        "computed",
        "reused",
        "reused",
        "reused",
        "computed",
        "computed",
        "reused",
        "reused",
        "computed",
    ]
    assert relative(result, theirs) < 1e-4
    assert messages.PASS_DIFFERS in told(model)


def test_a_call_of_another_shape_is_computed(own):
    """Here over a prompt that gets shorter on the way."""
    border = float(own()[0].get_model_object("model_sampling").percent_to_sigma(0.5))

    class Shrinking(Own):
        def forward(self, x, timesteps, context=None, transformer_options=None, **kwargs):
            late = transformer_options["sigmas"][0] <= border
            return super().forward(x, timesteps, context[:, :40] if late else context, transformer_options, **kwargs)

    model, _ = own()
    model.model.diffusion_model.__class__ = Shrinking
    sigmas = still_around(model, 0.5)
    theirs = sample(model, "sd15", sigmas=sigmas)
    cached = attach(model, reusing("cross", every=6))
    assert relative(sample(cached, "sd15", sigmas=sigmas), theirs) < 1e-4
    assert actions(cached)[4] == "computed" and "reused" in actions(cached)[5:]


def test_memory_is_bounded_to_the_byte(own):
    sites = attach(own()[0], reusing("self", every=2, weight="fitted", dtype="fp8"))
    sample(sites, "sd15", steps=12)
    every = last_report(sites)["run"]["features"]["bytes"]
    assert sum(last_report(sites)["totals"]["peak_cache_bytes"].values()) == every > 0
    model = attach(own()[0], reusing("self", every=2, weight="fitted", dtype="fp8", budget=every - 1))
    sample(model, "sd15", steps=12)
    assert last_report(model)["run"]["features"]["sites"] == DEPTH - 1
    assert "reused" in actions(model)


@pytest.mark.parametrize("hooked", [True, False], ids=["with another node's hook", "without"])
def test_a_compiled_model_gives_the_same_picture(own, hooked):
    def model_of_its_own():
        model, _ = own()
        if not hooked:
            del model.model_options["transformer_options"]["optimized_attention_override"]
        return model

    eager = attach(model_of_its_own(), reusing("self", every=2))
    options = dict(steps=8, scheduler="normal", cfg=1.0)
    plain = sample(eager, "sd15", **options)
    torch._dynamo.reset()
    backend = Backend()
    model = attach(compiled(model_of_its_own(), backend), reusing("self", every=2))
    result = sample(model, "sd15", **options)
    torch._dynamo.reset()
    assert actions(model) == actions(eager) and "reused" in actions(model)
    assert relative(result, plain) < 1e-3 < relative(sample(model_of_its_own(), "sd15", **options), plain)
    assert backend.calls >= len(actions(model))


# Models of the host as if nobody had entered them: where each hands its options to attention.
HANDED = (
    "sd15",
    "sdxl",
    "sd3",
    "flux",
    "chroma",
    "wan",
    "hunyuan",
    "ltxv",
    "qwen",
    "lumina2",
    "omnigen2",
    "predict2",
    "cosmos",
    "hidream",
    "aura",
    "mochi",
)


@pytest.mark.parametrize("name", HANDED)
def test_a_family_of_the_host_without_its_entry(tiny_models, monkeypatch, name):
    theirs = sample(tiny_models(name), name, sigmas=STILL, batch=2)
    monkeypatch.setattr(families, "FAMILIES", ())
    shuffled_batches(monkeypatch)
    model = attach(tiny_models(name), reusing("self"))
    held = sample(model, name, sigmas=STILL, batch=2)
    assert actions(model) == ACTIONS, told(model)
    assert relative(held, theirs) < 1e-4


@pytest.mark.parametrize("name", ["pixart", "hydit"])
def test_a_family_of_the_host_that_does_not_hand_on_its_options_needs_its_entry(tiny_models, monkeypatch, name):
    monkeypatch.setattr(families, "FAMILIES", ())
    model = attach(tiny_models(name), reusing("self"))
    sample(model, name, sigmas=STILL)
    assert actions(model) == ALL_COMPUTED and "no self feature was found" in told(model)


# Families of the host whose own entry names the same lists that are found without it.
FOUND = ("sd3", "flux", "chroma", "wan", "ltxv", "qwen", "predict2", "pixart", "mochi", "aura", "hydit", "omnigen2")


@pytest.mark.parametrize("name, kind", [(name, kind) for name in FOUND for kind in STACKED[name]])
def test_blocks_that_are_found_do_not_run_when_they_are_reused(tiny_models, monkeypatch, name, kind):
    """As with the entry: the same layers are left out, and what is reused is what would have been computed."""
    theirs, layers = host_picture(tiny_models(name), lambda model: sample(model, name, sigmas=STILL, batch=2))
    monkeypatch.setattr(families, "FAMILIES", ())
    shuffled_batches(monkeypatch)
    model = tiny_models(name)
    reused_as_computed(model, name, kind, theirs, layers, batch=2)


def test_what_was_found_is_told_with_its_lists(tiny_models, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ())
    model = attach(tiny_models("flux"), chosen_by_node())
    sample(model, "flux", steps=12)
    assert last_report(model)["run"]["features"]["depth"] == "all blocks" and "reused" in actions(model)
    assert messages.found_blocks("Flux", BLOCKS["flux"]) in told(model)


def test_storing_in_blocks_that_were_found_changes_nothing(tiny_models, monkeypatch):
    theirs = sample(tiny_models("flux"), "flux", sigmas=STILL)
    monkeypatch.setattr(families, "FAMILIES", ())
    model = attach(tiny_models("flux"), reusing("stack", every=1))
    assert torch.equal(sample(model, "flux", sigmas=STILL), theirs)
    assert last_report(model)["run"]["features"]["sites"] > 0, "it did store"


class Block(torch.nn.Module):
    """A block of a transformer, that adds to its input."""

    def __init__(self):
        super().__init__()
        self.inner = comfy.ops.disable_weight_init.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens, options, seen=None):
        if seen is not None:
            seen.append(tokens.mean())
        return tokens + optimized_attention(*self.inner(tokens).chunk(3, -1), HEADS, transformer_options=options)


class Blocks(Own):
    """A network of nobody's with a list of blocks, which may do `what` no list of blocks should.

    collects: what every block took in changes the end. turned: its tokens come before the batch. shuffled: its blocks
    run in another order.
    """

    def __init__(self, channels, context, what=None):
        super().__init__(channels, context)
        self.what = what
        self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
        generator = torch.Generator().manual_seed(5)
        for parameter in self.blocks.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / WIDTH**0.5

    def forward(self, x, timesteps, context=None, transformer_options=None, **kwargs):
        seen = [] if self.what == "collects" else None
        tokens = self.into(x.flatten(2).mT) + self.time(timesteps[:, None] / 1000)[:, None]
        if self.what == "turned":
            tokens = tokens.transpose(0, 1)
        for i in (0, 2, 1, 3) if self.what == "shuffled" else range(4):
            tokens = self.blocks[i](tokens, transformer_options, seen)
        if self.what == "turned":
            tokens = tokens.transpose(0, 1)
        end = tokens + sum(seen) if seen else tokens
        return self.out(end + self.prompt[0](context).mean(1, True)[..., :WIDTH]).mT.unflatten(2, x.shape[2:])


@pytest.fixture
def blocks(tiny_models):
    """Makes a MODEL of the class Blocks."""
    patcher = tiny_models("sd15")
    theirs = patcher.model.diffusion_model

    def make(what=None):
        patcher.model.diffusion_model = Blocks(SPECS["sd15"]["lat"][0], SPECS["sd15"]["ctx"][1], what)
        return patcher.clone()

    yield make
    patcher.model.diffusion_model = theirs


# What a network does that is not the host's own is seen in a real pass, so that some of its branches start later.
LONGER = torch.tensor([0.5] * 4 + [0.2, 0.0])


@pytest.mark.parametrize("kind", SPANS)
def test_blocks_of_a_network_that_is_not_the_hosts_own(blocks, monkeypatch, kind):
    theirs = sample(blocks(), "sd15", sigmas=LONGER, batch=2)
    shuffled_batches(monkeypatch)
    model = attach(blocks(), reusing(kind))
    held = sample(model, "sd15", sigmas=LONGER, batch=2)
    assert "reused" in actions(model) and relative(held, theirs) < 1e-4, told(model)
    assert messages.found_blocks("Blocks", ["blocks"]) in told(model)


def test_blocks_that_give_more_than_they_hand_on_are_found_out_and_left_alone(blocks):
    """Reused, the output for the same latent is another one: only attention is left."""
    theirs = sample(blocks("collects"), "sd15", sigmas=LONGER)
    model = attach(blocks("collects"), chosen_by_node())
    sample(model, "sd15", steps=12)
    assert messages.unknown_family("Blocks", [], True, True) in told(model)
    assert last_report(model)["run"]["features"]["depth"] == "all attention" and "reused" in actions(model)
    model = attach(blocks("collects"), reusing("stack"))
    assert relative(sample(model, "sd15", sigmas=LONGER), theirs) < 1e-4


@pytest.mark.parametrize("what", ["turned", "shuffled"])
def test_blocks_that_cannot_be_told_apart_by_branch_or_run_otherwise_are_not_taken(blocks, what):
    model = attach(blocks(what), chosen_by_node())
    sample(model, "sd15", steps=8, cfg=4.0)
    assert "no list of its blocks runs in order" in told(model)


@pytest.mark.parametrize("runs_dry", [True, False])
def test_a_model_whose_blocks_were_found_is_let_go_of(tiny_models, monkeypatch, runs_dry):
    """The host counts who holds on to a model before it takes it off the GPU."""
    monkeypatch.setattr(families, "FAMILIES", ())
    if not runs_dry:
        monkeypatch.setattr(dry_run.DryRun, "run", lambda *_: 1 / 0)
    first = attach(tiny_models("sd3"), reusing("stack"))
    gc.disable()
    try:
        sample(first, "sd3", sigmas=STILL)
        assert "found as it ran" in told(first)
        held = weakref.ref(first)
        del first
        sample(tiny_models("flux"), "flux", sigmas=STILL)
        assert held() is None
    finally:
        gc.enable()
