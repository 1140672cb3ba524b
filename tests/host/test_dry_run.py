"""The plan of cached features is made and told before anything is computed, and whatever it takes harms nothing."""

import functools
import gc
import sys
import weakref
from contextlib import contextmanager

import comfy.ldm.wan.model
import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from fastercache_pack.nodes.host import dry_run
from fastercache_pack.nodes.host.wrappers import attach, last_report
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from support.features import CASES, STILL, Backend, compiled, reusing
from support.further import FURTHER, FURTHER_CASES, know_further, options
from support.guidance import lora, windowed
from support.runs import actions, relative
from support.tiny import SPECS, build, conditioning, sample

KINDS = {
    name: [kind for n, kind in [*CASES, *FURTHER_CASES] if n == name and kind != "stack"] for name in [*SPECS, *FURTHER]
}


@pytest.fixture
def known(monkeypatch):
    """The further families, for as long as a test runs."""
    know_further(monkeypatch)


@contextmanager
def told_before(model, caplog):
    """What was told of cached features before the network itself ran, as a list that is filled while open."""
    told, network = [], model.model.diffusion_model

    def ran(*_):
        told.append([r.getMessage() for r in caplog.records if "FasterCache: features of" in r.getMessage()])

    hooks = [m.register_forward_pre_hook(ran) for m in network.modules() if not list(m.children())]
    try:
        with caplog.at_level("INFO"):
            caplog.clear()
            yield told
    finally:
        for hook in hooks:
            hook.remove()


def planned(model, name, caplog, sample=sample, **options):
    """(the one line that was told before the network ran, features of the report) of a run."""
    with told_before(model, caplog) as told:
        sample(model, name, **options)
    [line] = told[0]
    assert told[-1] == [line], "and nothing else since"
    return line, last_report(model)["run"]["features"]


def held_bytes(model):
    return sum(last_report(model)["totals"]["peak_cache_bytes"].values())


def megabytes(features):
    return f"{features['bytes'] / 1e6:.1f} MB of {features['budget'] / 1e6:.1f} MB on cpu, {features['dtype']}"


@pytest.mark.parametrize("name", list(KINDS))
def test_what_is_told_beforehand_is_what_is_held_in_the_end(tiny_models, known, caplog, name):
    """Of every family and kind, all stored at once: which sites, in which blocks, and the bytes of all branches."""
    given = options(name) if name in FURTHER else {"batch": 2}
    model = attach(tiny_models(name), reusing(*KINDS[name], every=1, weight="constant"))
    line, features = planned(model, name, caplog, sigmas=STILL, **given)
    assert features["sites"] == features["of"] > 0 and features["bytes"] == held_bytes(model)
    assert f"{features['of']} of {features['of']} sites" in line and megabytes(features) in line
    assert set(features["blocks"]) == set(KINDS[name])
    for kind, lists in features["blocks"].items():
        assert f"{kind}: " + ", ".join(f"{path} {numbers}" for path, numbers in lists.items()) in line


@pytest.mark.parametrize(
    "kind, kept, blocks", [("self", 2, "0-1 of 3"), ("self", 3, "0-2 of 3"), ("cross", 1, "0 of 3")]
)
def test_the_blocks_that_fit_are_named(tiny_models, caplog, kind, kept, blocks):
    every = attach(tiny_models("wan"), reusing(kind))
    sample(every, "wan", sigmas=STILL)
    budget = last_report(every)["run"]["features"]["bytes"] * kept // 3
    model = attach(tiny_models("wan"), reusing(kind, budget=budget))
    line, features = planned(model, "wan", caplog, sigmas=STILL)
    assert f"features of {kept} of 3 sites ({kind}: blocks {blocks})" in line
    assert features["blocks"] == {kind: {"blocks": blocks}} and features["bytes"] == budget == held_bytes(model)
    assert "reused" in actions(model)


def test_branches_that_run_one_by_one_are_all_in_the_plan(tiny_models, caplog, monkeypatch):
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    model = attach(tiny_models("wan"), reusing("self"))
    _, features = planned(model, "wan", caplog, sigmas=STILL)
    assert features["bytes"] == held_bytes(model) == 2 * 3 * 3 * 8 * 8 * 128 * 4, "branches, blocks, tokens, width"
    model = attach(tiny_models("wan"), reusing("self", budget=features["bytes"] - 1))
    line, less = planned(model, "wan", caplog, sigmas=STILL)
    assert less["sites"] == 2 and "2 of 3 sites" in line, "a site has room for both branches or for none"
    assert "reused" in actions(model)


def test_a_branch_with_larger_features_than_were_expected_stays_within_the_budget(tiny_models):
    """The other prompt is longer: its part of the attention over picture and text together takes more room."""
    longer = [[torch.cat([c, c], 1), fields] for c, fields in conditioning("sd3", 2)]
    run = lambda model: sample(model, "sd3", sigmas=STILL, negative=longer)
    every = attach(tiny_models("sd3"), reusing("self"))
    run(every)
    full = last_report(every)["run"]["features"]
    assert full["bytes"] == held_bytes(every)
    for budget in (full["bytes"], full["bytes"] - 1, full["bytes"] // 2):
        model = attach(tiny_models("sd3"), reusing("self", budget=budget))
        run(model)
        assert held_bytes(model) <= budget


def without_dry_run(monkeypatch, error=RuntimeError("no kernel")):
    def fail(*_):
        raise error

    monkeypatch.setattr(dry_run.DryRun, "run", fail)


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("sd15", "euler_ancestral"),
        ("wan", "euler"),
        ("ace", "dpmpp_sde"),
        ("hidream", "euler_ancestral"),
        ("hydit", "euler"),
    ],
)
def test_the_picture_is_the_same_to_the_bit_with_and_without_it(tiny_models, known, monkeypatch, name, sampler):
    given = dict(steps=5, sampler=sampler, **(options(name) if name in FURTHER else {}))
    ahead = attach(tiny_models(name), reusing("self", every=2))
    result = sample(ahead, name, **given)
    without_dry_run(monkeypatch)
    afterwards = attach(tiny_models(name), reusing("self", every=2))
    assert torch.equal(sample(afterwards, name, **given), result)
    ours, theirs = (last_report(model)["run"]["features"] for model in (ahead, afterwards))
    assert {**ours, "budget": 0} == {**theirs, "budget": 0} and actions(ahead) == actions(afterwards)
    assert "reused" in actions(ahead)


def test_where_the_network_cannot_run_without_values_the_plan_is_told_after_the_first_evaluation(
    tiny_models, monkeypatch, caplog
):
    without_dry_run(monkeypatch)
    model = attach(tiny_models("sd3"), reusing("stack"))
    with told_before(model, caplog) as told:
        sample(model, "sd3", sigmas=STILL)
    assert told[0] == [] and len(told[-1]) == 1 and "reused" in actions(model)
    assert not [record for record in caplog.records if "dry run" in record.getMessage()], "only for those who debug"


def test_a_torch_without_what_it_needs_costs_nothing_but_the_plan_beforehand(tiny_models, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, dry_run.__name__, None)  # importing it fails
    model = attach(tiny_models("sd3"), reusing("stack"))
    with told_before(model, caplog) as told:
        sample(model, "sd3", sigmas=STILL)
    assert told[0] == [] and len(told[-1]) == 1 and "reused" in actions(model)


def test_who_counts_operations_does_not_count_it(tiny_models, monkeypatch):
    def operations():
        with FlopCounterMode(display=False) as counter:
            sample(attach(tiny_models("sd15"), reusing("self")), "sd15", sigmas=STILL)
        return counter.get_total_flops()

    ahead = operations()
    without_dry_run(monkeypatch)
    assert ahead == operations()


def test_the_users_wish_to_stop_is_not_swallowed(tiny_models):
    comfy.model_management.interrupt_current_processing()
    model = attach(tiny_models("sd3"), reusing("stack"))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, "sd3", sigmas=STILL)


@pytest.mark.parametrize("name", list(KINDS))
def test_nothing_without_values_stays_in_the_host(tiny_models, known, name):
    """Some modules keep what they once computed, such as positions."""
    given = options(name) if name in FURTHER else {}
    model = attach(tiny_models(name), reusing(*KINDS[name], every=1))
    sample(model, name, sigmas=STILL, **given)
    for module in model.model.modules():
        for held in (vars(module), *(v for v in vars(module).values() if isinstance(v, dict))):
            assert not any(isinstance(value, FakeTensor) for value in held.values())


def test_what_the_hosts_functions_remember_is_real(tiny_models, monkeypatch, caplog):
    """As LTXV's positions in newer hosts: what was computed without values is computed again."""
    steps = functools.lru_cache(lambda count: torch.linspace(0.0, 1.0, count))
    steps(3)
    monkeypatch.setattr(comfy.ldm.wan.model, "steps", steps, raising=False)
    own = comfy.ldm.wan.model.sinusoidal_embedding_1d
    monkeypatch.setattr(comfy.ldm.wan.model, "sinusoidal_embedding_1d", lambda dim, at: own(dim, at) + steps(dim))
    model = attach(tiny_models("wan"), reusing("self"))
    planned(model, "wan", caplog, sigmas=STILL)
    assert "reused" in actions(model) and not isinstance(steps(256), FakeTensor)


def test_what_others_put_on_the_model_does_not_see_tensors_without_values(tiny_models):
    """Their patches, wrappers and attention are called for real passes only."""
    model, seen = tiny_models("sd15"), []

    def look(*values):
        seen.append(any(isinstance(value, FakeTensor) for value in values))

    def patch(q, k, v, options):
        look(q, k, v)
        return q, k, v

    def attention(function, *args, **kwargs):
        look(*args)
        return function(*args, **kwargs)

    def wrapper(executor, *args, **kwargs):
        look(*args)
        return executor(*args, **kwargs)

    model.set_model_attn1_patch(patch)
    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    model.add_wrapper_with_key("diffusion_model", "another", wrapper)
    sample(attach(model, reusing("self")), "sd15", sigmas=STILL)
    assert seen and not any(seen)


def test_a_network_on_which_others_replaced_a_function_is_left_alone(caplog):
    """It may keep what it sees."""
    own, seen = build("sd3"), []  # the host leaves a trace of such a patch on it
    model = own.clone()
    block = model.model.diffusion_model.joint_blocks[1]

    def forward(*args, **kwargs):
        seen.append(isinstance(args[0], FakeTensor))
        return type(block).forward(block, *args, **kwargs)

    model.add_object_patch("diffusion_model.joint_blocks.1.forward", forward)
    model = attach(model, reusing("self"))
    with told_before(model, caplog) as told:
        sample(model, "sd3", sigmas=STILL)
    assert seen and not any(seen) and "reused" in actions(model) and told[0] == []
    model = attach(own.clone(), reusing("self"))
    planned(model, "sd3", caplog, sigmas=STILL)  # once it is gone, all is as it was


def test_a_compiled_network_is_not_compiled_for_it(tiny_models, monkeypatch):
    def graphs(model):
        torch._dynamo.reset()
        backend = Backend()
        result = sample(attach(compiled(model, backend), reusing("stack", every=2)), "flux", steps=6, cfg=1.0)
        torch._dynamo.reset()
        return backend.graphs, result

    ahead = graphs(tiny_models("flux"))
    without_dry_run(monkeypatch)
    later = graphs(tiny_models("flux"))
    assert ahead[0] == later[0] and torch.equal(ahead[1], later[1])


def test_weights_that_wait_elsewhere_and_a_lora_are_not_touched(tiny_models, caplog, monkeypatch):
    """As with --lowvram: each layer's weight is brought, and the LoRA added to it, when it is used."""
    model = tiny_models("wan")
    patched = comfy.sd.load_lora_for_models(model, None, lora(model), 1.0, 0.0)[0]
    theirs = sample(patched, "wan", sigmas=STILL)
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            monkeypatch.setattr(module, "comfy_cast_weights", True, raising=False)
    cached = attach(patched, reusing("self"))
    with told_before(cached, caplog) as told:
        result = sample(cached, "wan", sigmas=STILL)
    assert len(told[0]) == 1 and relative(result, theirs) < 1e-4


def test_as_the_host_runs_it_without_gradients_of_any_kind(tiny_models, caplog):
    with torch.inference_mode():
        model = attach(tiny_models("sd3"), reusing("self"))
        planned(model, "sd3", caplog, sigmas=STILL)


def test_a_long_video_is_planned_from_its_first_window_on(tiny_models, caplog):
    model = attach(windowed(tiny_models("wan")), reusing("self"))
    with told_before(model, caplog) as told:
        sample(model, "wan", latent=torch.zeros(1, 16, 7, 8, 8), sigmas=STILL)
    assert len(told[0]) == 1
    assert last_report(model)["run"]["features"]["bytes"] == held_bytes(model), "of all windows in the end"


def test_the_hosts_model_is_let_go_of_when_the_next_one_runs(tiny_models):
    """The host counts who holds on to a model before it takes it off the GPU."""
    first = attach(tiny_models("sd3"), reusing("stack"))
    gc.disable()
    try:
        sample(first, "sd3", sigmas=STILL)
        held = weakref.ref(first)
        del first
        sample(tiny_models("sd3"), "sd3", sigmas=STILL)
        assert held() is None
    finally:
        gc.enable()
