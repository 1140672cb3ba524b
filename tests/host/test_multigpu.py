"""The host's MultiGPU CFG Split: branches in threads, each on a device with a network of its own.

Two CPU devices stand in for GPUs.
"""

import threading
import time

import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.report import EvaluationRecord
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import automatic
from fastercache_pack.nodes.host import run
from fastercache_pack.nodes.host.calibrate import CalibrationError, Sampling, find_policy
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import ALL_COMPUTED, STILL, reusing
from support.guidance import cfg_cache, with_steps
from support.runs import actions, estimates, evaluations, notes, relative, totals
from support.tiny import SPECS, build, conditioning, sample

pytestmark = pytest.mark.skipif(
    not hasattr(comfy.samplers, "_calc_cond_batch_multigpu"), reason="this ComfyUI has no MultiGPU CFG Split"
)
SECOND = torch.device("cpu", 1)


@pytest.fixture
def split():
    """Makes a MODEL on two devices, as MultiGPU CFG Split does, and a list of the devices on which networks ran."""

    def make(model, name="flux"):
        second, ran = build(name), []
        second.load_device, second.is_multigpu_base_clone = SECOND, True
        second.clone_base_uuid = model.clone_base_uuid
        model = model.clone()
        model.set_additional_models("multigpu", [second])
        model.match_multigpu_clones()
        networks = {"first": model.model.diffusion_model, "second": second.model.diffusion_model}
        hooks = [
            network.register_forward_pre_hook(lambda *_, device=device: ran.append(device))
            for device, network in networks.items()
        ]
        made.extend(hooks)
        return model, ran

    made = []
    yield make
    for hook in made:
        hook.remove()


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("settings", [cfg_cache(), with_steps()], ids=["CFG-Cache", "steps"])
def test_steps_and_negative_passes_are_skipped_as_on_one_device(tiny_models, split, settings, first):
    """Whichever of the two nodes comes first."""
    alone = attach(tiny_models("flux"), settings)
    one = sample(alone, "flux", 16)
    if first == "ours":
        model, ran = split(attach(tiny_models("flux"), settings))
    else:
        model, ran = split(tiny_models("flux"))
        model = attach(model, settings)
    two = sample(model, "flux", 16)
    assert relative(two, one) < 1e-4
    assert actions(model) == actions(alone) and actions(model, "uncond") == actions(alone, "uncond")
    assert {"estimated", "predicted"} & {*evaluations(model)}
    rows = totals(model)["rows"]
    assert rows == totals(alone)["rows"] == len(ran) and set(ran) == {"first", "second"}


def test_with_nothing_skipped_the_picture_is_the_hosts_own(tiny_models, split):
    model, _ = split(tiny_models("flux"))
    theirs = sample(model, "flux")
    assert torch.equal(sample(attach(model, CacheSettings("nothing")), "flux"), theirs)


def test_features_stand_down_and_that_is_said(tiny_models, split):
    """Ten times over: what threads break, they do not break every time."""
    model, ran = split(tiny_models("flux"))
    theirs = sample(model, "flux", sigmas=STILL)
    for _ in range(10):
        ran.clear()
        cached = attach(model, reusing("stack"))
        assert torch.equal(sample(cached, "flux", sigmas=STILL), theirs)
        assert actions(cached) == ALL_COMPUTED and messages.SEVERAL_DEVICES in notes(cached)
        assert ran.count("first") == ran.count("second") == len(ALL_COMPUTED)
    assert "features" not in last_report(cached)["run"]


def test_features_beside_cfg_cache_leave_cfg_cache_on(tiny_models, split):
    model, _ = split(tiny_models("flux"))
    both = attach(model, CacheSettings("both", cfg_cache().controller, cfg_cache().difference, reuse=reusing().reuse))
    sample(both, "flux", 16)
    assert estimates(both) and messages.SEVERAL_DEVICES in notes(both)
    assert messages.NOTHING_ON not in notes(both)


def test_what_is_decided_by_errors_is_decided_as_on_one_device(tiny_models, split):
    alone = attach(tiny_models("sd15"), automatic("adaptive", 30, Window()))
    one = sample(alone, "sd15", 20)
    model, _ = split(tiny_models("sd15"), "sd15")
    model = attach(model, automatic("adaptive", 30, Window()))
    assert relative(sample(model, "sd15", 20), one) < 1e-3
    assert actions(model) == actions(alone) and evaluations(model)["predicted"] > 0


def test_several_conditionings_on_two_devices(tiny_models, split):
    positive = conditioning("flux", 1) + conditioning("flux", 5)
    alone = attach(tiny_models("flux"), cfg_cache())
    one = sample(alone, "flux", 12, positive=positive)
    model, _ = split(tiny_models("flux"))
    model = attach(model, cfg_cache())
    assert relative(sample(model, "flux", 12, positive=positive), one) < 1e-4
    assert actions(model, "uncond") == actions(alone, "uncond") and totals(model)["rows"] == totals(alone)["rows"]


def test_a_policy_is_found_there_but_none_with_features(tiny_models, split):
    model, ran = split(tiny_models("sd15"), "sd15")
    prompts = conditioning("sd15", 1), conditioning("sd15", 2)
    latent = torch.zeros(1, *SPECS["sd15"]["lat"])
    sampling = Sampling(*prompts, latent, seed=3, steps=6, cfg=4.0, sampler="euler", scheduler="simple")
    assert find_policy(model, sampling, 0.7).cost <= 0.7 and {*ran} == {"first", "second"}
    with pytest.raises(CalibrationError, match="MultiGPU CFG Split"):
        find_policy(model, sampling, 0.7, features=True)


def test_a_device_that_fails_ends_the_run_and_the_next_one_works(tiny_models, split):
    model, _ = split(tiny_models("flux"))
    model = attach(model, cfg_cache())
    theirs = sample(model, "flux")
    [second] = model.get_additional_models_with_key("multigpu")

    def fail(*_):
        raise RuntimeError("the second device fell over")

    hook = second.model.diffusion_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="fell over"):
        sample(model, "flux")
    hook.remove()
    assert last_report(model)["evaluations"], "what came before is in the report"
    assert torch.equal(sample(model, "flux"), theirs)


def test_rows_that_enter_at_the_same_moment_are_all_counted(tiny_models, monkeypatch):
    class Slow(EvaluationRecord):
        """Takes its time between reading a count and writing it."""

        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name == "rows" and threading.current_thread() is not threading.main_thread():
                time.sleep(0.01)
            return value

    monkeypatch.setattr(run, "EvaluationRecord", Slow)
    seen = []

    def at_once(executor, *args, **kwargs):
        seen.append(args[0].shape[0])
        [state] = [value for value in args[5].values() if isinstance(value, run.CacheRun)]
        threads = [threading.Thread(target=state.count, args=(1,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return executor(*args, **kwargs)

    model = attach(tiny_models("flux"), cfg_cache())
    model.add_wrapper_with_key("apply_model", "test", at_once)
    sample(model, "flux", 4)
    assert totals(model)["rows"] == sum(seen) + 8 * len(seen)
