"""The host's own compiler and CUDA graphs: skipped passes leave them alone, changed ones switch them off."""

import threading
from contextlib import ExitStack

import pytest
import torch
from comfy.cli_args import args
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.nodes.fastercache import automatic
from fastercache_pack.nodes.host.calibrate import Sampling, recorded
from fastercache_pack.nodes.host.compiler import nothing_repeated
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.compiler import SWITCHES, Compiler
from support.features import ACTIONS, STILL, out_of_memory, reusing, told
from support.guidance import cfg_cache, with_steps
from support.runs import actions, notes
from support.tiny import SPECS, conditioning, sample

STEPS = 16
ON, GRAPHS_OFF, OFF = (False, False), (False, True), (True, True)


def state():
    return tuple(getattr(args, name) for name in SWITCHES)


@pytest.fixture
def compiled(tiny_models, monkeypatch):
    """Makes a MODEL whose network a stand-in compiles, as on a host of `version`, and that stand-in."""

    def make(name="flux", version="0.35.0", **options):
        model = tiny_models(name)
        made.append(Compiler(model.model.diffusion_model, monkeypatch, version, **options))
        return model, made[-1]

    made = []
    yield make
    for compiler in made:
        compiler.close()


@pytest.mark.parametrize("version", ["0.35.0", "0.43.0"])
@pytest.mark.parametrize(
    "name, settings",
    [("flux", cfg_cache()), ("flux", with_steps()), ("sd15", automatic("adaptive", 30, Window()))],
    ids=["CFG-Cache", "steps", "adaptive"],
)
def test_predicted_steps_and_cfg_cache_change_no_pass(tiny_models, compiled, settings, version, name):
    """Nothing of theirs outlives a pass, every block of a pass runs, and the compiler stays on."""
    plain = attach(tiny_models(name), settings)
    expected = sample(plain, name, STEPS)
    assert {"predicted", "estimated"} & {*actions(plain), *actions(plain, "uncond")}
    model, compiler = compiled(name, version)
    model = attach(model, settings)
    assert torch.equal(sample(model, name, STEPS), expected)
    assert actions(model) == actions(plain) and actions(model, "uncond") == actions(plain, "uncond")
    assert compiler.compiled > 0 == compiler.uncompiled and compiler.switched == {ON}
    assert messages.COMPILER_OFF not in notes(model)


@pytest.mark.parametrize("name, kind", [("flux", "stack"), ("sd15", "self"), ("sd15", "deep")])
def test_feature_reuse_switches_it_off_for_its_run_and_says_so(tiny_models, compiled, name, kind):
    plain = attach(tiny_models(name), reusing(kind))
    expected = sample(plain, name, sigmas=STILL)
    assert messages.COMPILER_OFF not in notes(plain)
    model, compiler = compiled(name)
    model = attach(model, reusing(kind))
    assert torch.equal(sample(model, name, sigmas=STILL), expected)
    assert actions(model) == ACTIONS and messages.COMPILER_OFF in notes(model)
    assert compiler.switched == {OFF} and state() == ON


@pytest.mark.parametrize("name, kind", [("flux", "stack"), ("sd15", "self")])
def test_left_on_it_would_fail(compiled, name, kind):
    """The stand-in does not accept reused features: a host that tolerates them is another one."""
    model, _ = compiled(name, "0.37.0")
    with pytest.raises(RuntimeError, match="memory compile error"):
        sample(attach(model, reusing(kind)), name, sigmas=STILL)
    assert state() == ON


@pytest.mark.parametrize("name, kind", [("flux", "stack"), ("flux", "front"), ("sd15", "self")])
def test_a_host_that_tolerates_other_passes_goes_on_compiling(tiny_models, compiled, name, kind):
    """But repeats none without calling it; and what is stored is none of the compiler's memory."""
    plain = attach(tiny_models(name), reusing(kind))
    expected = sample(plain, name, sigmas=STILL)
    model, compiler = compiled(name, "0.37.0", tolerant=True)
    model = attach(model, reusing(kind))
    assert torch.equal(sample(model, name, sigmas=STILL), expected)
    assert actions(model) == ACTIONS and messages.COMPILER_OFF not in notes(model)
    assert compiler.switched == {GRAPHS_OFF} and state() == ON
    assert compiler.compiled == len(ACTIONS) and compiler.left == 0 < compiler.breaks


def test_a_host_that_was_told_to_fail_on_other_passes_does_not_tolerate_them(compiled, monkeypatch):
    model, compiler = compiled(version="0.37.0")
    monkeypatch.setattr(args, "assert_graph_breaks", True)
    model = attach(model, reusing("stack"))
    sample(model, "flux", sigmas=STILL)
    assert actions(model) == ACTIONS and compiler.switched == {OFF}


@pytest.mark.parametrize("failure", [InterruptedError, RuntimeError])
def test_it_is_on_again_however_a_run_ends(compiled, failure):
    model, _ = compiled()
    model = attach(model, reusing("stack"))

    def end(step, *_):
        assert state() == OFF
        if step == 2:
            raise failure

    with pytest.raises(failure):
        sample(model, "flux", sigmas=STILL, callback=end)
    assert state() == ON and len(last_report(model)["evaluations"]) == 3


def test_who_switched_it_off_keeps_it_off(compiled):
    model, compiler = compiled()
    args.disable_comfy_compiler = True
    model = attach(model, reusing("stack"))
    sample(model, "flux", sigmas=STILL)
    assert state() == (True, False) and compiler.switched == {OFF}
    assert messages.COMPILER_OFF not in notes(model), "it is not this run that it is off for"


def test_a_run_within_a_run_does_not_switch_it_on(tiny_models, compiled):
    model, _ = compiled()
    outer, inner = attach(model, reusing("stack")), attach(tiny_models("sd15"), reusing("self"))
    states = []

    def between(*_):
        sample(inner, "sd15", sigmas=STILL)
        states.append(state())

    sample(outer, "flux", sigmas=STILL, callback=between)
    assert set(states) == {OFF} and state() == ON


def test_runs_side_by_side_switch_it_on_when_the_last_one_ends(compiled):
    compiled()
    first, second = ExitStack(), ExitStack()
    first.enter_context(nothing_repeated())
    second.enter_context(nothing_repeated())
    first.close()
    assert state() == OFF
    second.close()
    assert state() == ON
    threads = [threading.Thread(target=_many_runs) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == ON


def _many_runs():
    for _ in range(200):
        with nothing_repeated():
            assert state() == OFF


def test_a_host_without_a_compiler_is_left_as_it_is(tiny_models):
    before = vars(args).copy()
    sample(attach(tiny_models("flux"), reusing("stack")), "flux", sigmas=STILL)
    assert vars(args) == before


def test_a_pass_that_ran_out_of_memory_is_cleared_up_before_it_runs_again(compiled):
    """The host keeps the weights of a pass that broke off in GPU memory until the node ends."""
    model, compiler = compiled()
    network = model.model.diffusion_model
    cached = attach(model, reusing("stack"))
    with out_of_memory(network.final_layer, 2):
        sample(cached, "flux", sigmas=STILL)
    assert messages.OUT_OF_MEMORY in told(cached) and compiler.cleaned == 1


@pytest.mark.parametrize("features", [True, False])
def test_a_policy_is_looked_for_without_it_only_where_features_are_tried(compiled, features):
    model, compiler = compiled("sd15")
    prompts = conditioning("sd15", 1), conditioning("sd15", 2)
    latent = torch.zeros(1, *SPECS["sd15"]["lat"])
    recorded(model, Sampling(*prompts, latent, seed=3, steps=6, cfg=4.0, sampler="euler", scheduler="simple"), features)
    assert compiler.switched == {OFF if features else ON} and state() == ON
