"""Feature reuse on every model family: exactly what is said runs, and what comes from the cache is right."""

import functools
import threading
import time

import comfy.controlnet
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Evaluation, Interval
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.fastercache_core.features.storage import Storage
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.families import find_family
from fastercache_pack.nodes.host.feature_pass import FeaturePass, FeatureRequest
from fastercache_pack.nodes.host.model_call import ModelCall
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import (
    ACTIONS,
    ALL_COMPUTED,
    CASES,
    STILL,
    Watch,
    host_picture,
    out_of_memory,
    reused_as_computed,
    reusing,
    shuffled_batches,
    told,
)
from support.guidance import windowed
from support.runs import actions, notes, relative
from support.tiny import SPECS, conditioning, sample


@pytest.fixture(scope="module")
def full(tiny_models):
    """The host's own picture, by family: two different latents, and the layers of the network that run."""
    return functools.cache(
        lambda name: host_picture(tiny_models(name), lambda model: sample(model, name, sigmas=STILL, batch=2))
    )


@pytest.mark.parametrize("name, kind", CASES)
def test_what_is_reused_does_not_run_and_is_what_would_have_been_computed(tiny_models, full, monkeypatch, name, kind):
    """Two branches whose features stand still and differ, two different latents in a batch, batched anyhow.

    Whatever crossed over, was stored wrongly or was written to by the host would show.
    """
    theirs, layers = full(name)
    shuffled_batches(monkeypatch)
    passes = reused_as_computed(tiny_models(name), name, kind, theirs, layers, batch=2)
    assert len(passes) > len(ACTIONS), "some evaluations were run one by one"


@pytest.mark.parametrize("name", list(SPECS))
def test_storing_changes_nothing(tiny_models, full, name):
    """Every evaluation is computed and stored, of several kinds at once: the host's own picture, to the bit."""
    theirs, _ = full(name)
    kinds = [kind for n, kind in CASES if n == name]
    others = [kind for kind in kinds if kind != "stack"]  # the halves of the same blocks
    for together in [others, ["stack"]] if "stack" in kinds else [others]:
        model = attach(tiny_models(name), reusing(*together, every=1))
        assert torch.equal(sample(model, name, sigmas=STILL, batch=2), theirs)
        assert last_report(model)["run"]["features"]["sites"] > 0, "it did store"


@pytest.mark.parametrize("name", list(SPECS))
def test_the_branches_and_the_latents_of_these_tests_differ_and_the_model_is_left_as_it_was(tiny_models, full, name):
    theirs, _ = full(name)
    swapped = sample(tiny_models(name), name, sigmas=STILL, batch=2, negative=conditioning(name, 1))
    assert relative(swapped, theirs) > 0.003, "guidance acts"
    assert relative(theirs[:1], theirs[1:]) > 0.01
    assert torch.equal(sample(tiny_models(name), name, sigmas=STILL, batch=2), theirs)


def test_every_kind_of_every_family_is_tested(tiny_models):
    for name in SPECS:
        family = find_family(tiny_models(name).model.diffusion_model)
        assert family.kinds() == {kind for n, kind in CASES if n == name}, name


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that gives a residual to every block, without a network."""

    def __init__(self, shapes, seed=0):
        super().__init__()
        self.shapes, self.seed, self.given = shapes, seed, []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        if self.timestep_range and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
            return None
        g = torch.Generator().manual_seed(self.seed)
        control = {
            place: [torch.randn(1, *shape, generator=g).repeat(len(x_noisy), 1, 1) for _ in range(count)]
            for place, (count, shape) in self.shapes.items()
        }
        self.given.append(control)
        return control

    def on(self, cond, end=1.0):
        """The conditioning under this ControlNet, up to a part of sampling."""
        self.timestep_percent_range = (0.0, end)
        return [[tensor, {**fields, "control": self, "control_apply_to_uncond": False}] for tensor, fields in cond]


CONTROLLED = {
    "flux": {"input": (2, (64, 64)), "output": (3, (64, 64))},
    "chroma": {"input": (2, (64, 64)), "output": (3, (64, 64))},
    "hunyuan": {"input": (2, (192, 128)), "output": (2, (192, 128))},
    "qwen": {"input": (3, (64, 64))},
    "sd3": {"output": (3, (64, 192))},
}


@pytest.mark.parametrize("name, kind", [case for case in CASES if case[0] in CONTROLLED])
def test_what_the_host_adds_in_place_does_not_reach_the_cache(tiny_models, full, name, kind):
    """ControlNet residuals are added between the blocks, onto the very tensors that these return."""
    control = Residuals(CONTROLLED[name])
    conds = {who: control.on(conditioning(name, seed)) for who, seed in (("positive", 1), ("negative", 2))}
    theirs = sample(tiny_models(name), name, sigmas=STILL, batch=2, **conds)
    assert relative(theirs, full(name)[0]) > 0.01, "the residuals act"
    model = attach(tiny_models(name), reusing(kind))
    assert relative(sample(model, name, sigmas=STILL, batch=2, **conds), theirs) < 1e-4
    assert actions(model) == ACTIONS
    before = Residuals(CONTROLLED[name]).get_control(torch.zeros(4), [0.5], None, 2, {})
    for given in control.given:
        for place, values in given.items():
            assert all(torch.equal(a, b) for a, b in zip(values, before[place])), "the ControlNet's own tensors"


def test_where_a_controlnet_ends_features_from_before_are_not_reused(tiny_models):
    """They hold its residuals."""
    conds = {}
    for who, seed in (("positive", 1), ("negative", 2)):
        conds[who] = Residuals(CONTROLLED["flux"]).on(conditioning("flux", seed), end=0.5)
    model = attach(tiny_models("flux"), reusing("stack", every=6))
    border = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    sigmas = torch.tensor([border + 0.1] * 4 + [border - 0.1] * 4 + [0.1, 0.0])
    theirs = sample(tiny_models("flux"), "flux", sigmas=sigmas, **conds)
    result = sample(model, "flux", sigmas=sigmas, **conds)
    assert actions(model) == ["computed", *["reused"] * 3, "computed", *["reused"] * 3, "computed"]
    assert relative(result, theirs) < 1e-4


@pytest.mark.parametrize(
    "name, kind, dtype",
    [("sd15", "self", "fp16"), ("sd3", "self", "native"), ("flux", "front", "fp8"), ("wan", "cross", "fp8")],
)
def test_the_budget_is_kept_to_the_byte(tiny_models, name, kind, dtype):
    """Exactly what is held is promised; a byte less, and one site less is kept."""

    def run(budget):
        model = attach(tiny_models(name), reusing(kind, every=2, weight="constant", budget=budget, dtype=dtype))
        return sample(model, name, sigmas=STILL), model, last_report(model)["run"]["features"]

    _, _, every = run(None)
    assert every["sites"] == every["of"] and every["dtype"] == dtype and every["device"] == "cpu"
    _, model, exact = run(every["bytes"])
    assert (exact["sites"], exact["bytes"]) == (every["of"], every["bytes"])
    assert sum(last_report(model)["totals"]["peak_cache_bytes"].values()) == every["bytes"]
    _, model, less = run(every["bytes"] - 1)
    assert less["sites"] == every["of"] - 1 and less["of"] == every["of"] and less["bytes"] < every["bytes"]
    assert sum(last_report(model)["totals"]["peak_cache_bytes"].values()) == less["bytes"]
    assert ("reused" in actions(model)) == (less["sites"] > 0)


@pytest.mark.parametrize("name, kind", [("sd15", "deep"), ("sd3", "self"), ("flux", "stack"), ("wan", "self")])
def test_without_room_everything_runs_and_the_report_says_why(tiny_models, name, kind):
    model = attach(tiny_models(name), reusing(kind, budget=1))
    assert torch.equal(sample(model, name, sigmas=STILL), sample(tiny_models(name), name, sigmas=STILL))
    assert set(actions(model)) == {"computed"}
    [note] = last_report(model)["notes"]
    assert f"no {kind} feature fits" in note and "memory_gb" in note
    assert last_report(model)["totals"]["peak_cache_bytes"] == {}


def test_a_network_without_such_places_says_so(tiny_models, monkeypatch):
    """A UNet of one level has nothing below its first downsampling."""
    monkeypatch.setitem(
        SPECS,
        "one level",
        {
            **SPECS["sd15"],
            "cfg": {
                **SPECS["sd15"]["cfg"],
                "channel_mult": [1],
                "num_res_blocks": [1],
                "transformer_depth": [1],
                "transformer_depth_output": [1, 1],
            },
        },
    )
    model = attach(tiny_models("one level"), reusing("deep"))
    sample(model, "one level", sigmas=STILL)
    assert set(actions(model)) == {"computed"}
    assert "no deep feature was found" in told(model)


@pytest.mark.parametrize("kind", ["self", "stack"])
def test_each_context_window_of_a_long_video_has_its_own_features(tiny_models, kind):
    options = dict(latent=torch.zeros(1, 16, 7, 8, 8), sigmas=STILL)
    theirs = sample(windowed(tiny_models("wan")), "wan", **options)
    model = attach(windowed(tiny_models("wan")), reusing(kind))
    assert relative(sample(model, "wan", **options), theirs) < 1e-4
    assert actions(model) == ACTIONS


def test_windows_that_move_on_do_not_fill_the_memory(tiny_models):
    """Where no window comes back, nothing is reused, and what is held stays what a few evaluations leave."""
    options = dict(latent=torch.zeros(1, 16, 9, 8, 8), sigmas=torch.linspace(0.9, 0.0, 13))
    model = attach(windowed(tiny_models("wan"), "standard_uniform"), reusing("stack", every=2))
    assert torch.isfinite(sample(model, "wan", **options)).all()
    alone = attach(tiny_models("wan"), reusing("stack", every=2))
    sample(alone, "wan", latent=torch.zeros(1, 16, 3, 8, 8), sigmas=torch.linspace(0.9, 0.0, 13))
    one = sum(last_report(alone)["totals"]["peak_cache_bytes"].values())
    assert sum(last_report(model)["totals"]["peak_cache_bytes"].values()) < 5 * 5 * one, "5 windows, 5 evaluations"


def test_several_kinds_each_keep_their_own_interval(tiny_models):
    settings = ReuseSettings({"self": Interval(2), "cross": Interval(3)}, "hold")
    model = attach(tiny_models("wan"), CacheSettings("both", reuse=settings))
    with Watch(model) as watch:
        sample(model, "wan", sigmas=torch.tensor([0.5] * 7 + [0.3, 0.0]))
    ran = {
        part: [any(part in layer for layer in calls) for _, calls in watch.passes]
        for part in ("self_attn", "cross_attn")
    }
    assert ran["self_attn"] == [True, False, True, False, True, False, True, True]
    assert ran["cross_attn"] == [True, False, False, True, False, False, True, True]


def test_a_pass_that_runs_out_of_memory_is_run_again_without_features(tiny_models):
    """What the cache holds must not cost the picture."""
    theirs = sample(tiny_models("flux"), "flux", sigmas=STILL)
    model = attach(tiny_models("flux"), reusing("stack"))
    with out_of_memory(model.model.diffusion_model.final_layer, 2):
        assert relative(sample(model, "flux", sigmas=STILL), theirs) < 1e-5
    assert actions(model) == ALL_COMPUTED and "memory ran out" in told(model)


@pytest.mark.parametrize("when", ["before anything is stored", "at the first feature"])
def test_where_memory_runs_out_at_once_features_are_given_up(tiny_models, monkeypatch, when):
    """No advice to give them more memory: there was none."""
    theirs = sample(tiny_models("flux"), "flux", sigmas=STILL)
    model, layer = attach(tiny_models("flux"), reusing("stack")), tiny_models("flux").model.diffusion_model.img_in
    if when == "before anything is stored":
        with out_of_memory(layer, 1):
            result = sample(model, "flux", sigmas=STILL)
    else:
        monkeypatch.setattr(Storage, "put", no_room)
        result = sample(model, "flux", sigmas=STILL)
    assert torch.equal(result, theirs) and actions(model) == ALL_COMPUTED
    [note] = notes(model)
    assert note == messages.OUT_OF_MEMORY_AT_ONCE and "memory_gb" not in note


def no_room(*_):
    raise torch.cuda.OutOfMemoryError("no room")


def test_out_of_memory_without_any_features_is_the_hosts_own_matter(tiny_models):
    model = attach(tiny_models("flux"), reusing("stack", budget=1))
    with out_of_memory(model.model.diffusion_model.final_layer), pytest.raises(torch.cuda.OutOfMemoryError):
        sample(model, "flux", sigmas=STILL)


class Passes(threading.Thread):
    """Passes of one Flux network with features of their own, every second one with what the first one stored."""

    def __init__(self, model, seed):
        super().__init__()
        self.model, self.results, self.reused = model, [], []
        self.features = FeaturePass(reusing("stack", every=2).reuse, model, lambda percent: 1.0 - percent)
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(1, *SPECS["flux"]["lat"], generator=generator)
        self.context = torch.randn(1, *SPECS["flux"]["ctx"], generator=generator)
        self.given = {"y": torch.randn(1, SPECS["flux"]["pooled"], generator=generator), "guidance": torch.ones(1)}

    class Executor:
        """The end of the host's chain of wrappers."""

        def __init__(self, model):
            self.class_obj = model

        def __call__(self, *args, **kwargs):
            return self.class_obj._apply_model(*args, **kwargs)

    def run(self):
        options = {"cond_or_uncond": [0], "uuids": ["a"], "sigmas": torch.tensor([0.5])}
        executor = self.Executor(self.model.model)
        for ordinal in range(8):
            self.features.begin(Evaluation(ordinal, 0.9 - 0.1 * ordinal, 0.1 * ordinal, False), self.x)
            call = ModelCall(executor, self.x, torch.tensor([0.5]), None, self.context, None, options, (), self.given)
            result, kinds = self.features.run(call, FeatureRequest(["a"], ["a"], True))
            self.results.append(result)
            self.reused.append(bool(kinds))


def test_threads_that_share_one_network_take_turns(tiny_models):
    """Each swaps functions of its modules while a pass runs, and leaves it as it was."""
    model = tiny_models("flux")
    network = model.model.diffusion_model
    alone = [Passes(model, seed) for seed in range(3)]
    for passes in alone:
        passes.run()
    hook = network.final_layer.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    together = [Passes(model, seed) for seed in range(3)]
    for passes in together:
        passes.start()
    for passes in together:
        passes.join()
    hook.remove()
    for passes, expected in zip(together, alone):
        assert passes.reused == expected.reused == [False, True] * 4
        assert all(torch.equal(a, b) for a, b in zip(passes.results, expected.results, strict=True))
    assert not any("forward" in vars(module) for module in network.modules())
