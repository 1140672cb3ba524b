"""Runs that are stopped: wherever it happens, the next one is as if it had not been, and nothing of ours is left."""

import gc
from contextlib import contextmanager

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.controllers.planned import MixSettings
from fastercache_pack.fastercache_core.engine import Engine
from fastercache_pack.fastercache_core.features.storage import StorageSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.frdiff import frdiff_settings
from fastercache_pack.nodes.host.feature_pass import FeaturePass
from fastercache_pack.nodes.host.run import CacheRun
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.guidance import with_steps
from support.inputs import feature_reuse
from support.tiny import sample

STEPS = 6
SETTINGS = {
    "steps and differences": with_steps(),
    "features": CacheSettings("features", reuse=feature_reuse("fitted", "all attention")),
    "paper": PRESETS["paper"](Window()),
    "FRDiff": frdiff_settings(MixSettings(2, "paper"), StorageSettings()),
}
FAULTS = [comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError, KeyboardInterrupt]


class Stop:
    """Raises a fault from its n-th call on: memory that ran out stays so."""

    def __init__(self, fault, after):
        self.fault, self.left = fault, after

    def __call__(self, *_, **__):
        self.left -= 1
        if self.left < 0:
            raise self.fault("stopped")


@contextmanager
def in_mid_block(model, stop):
    """The fault comes inside the second block of the network."""
    hook = model.model.diffusion_model.joint_blocks[1].x_block.mlp.register_forward_pre_hook(stop)
    try:
        yield model, {}
    finally:
        hook.remove()


@contextmanager
def in_the_sampler(model, stop):
    """The fault comes after a step, as an interrupt of the page does."""
    yield model, {"callback": stop}


@contextmanager
def in_guidance(model, stop):
    """The fault comes in another node's function on the guided result."""
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda given: stop() or given["denoised"])
    yield model, {}


@contextmanager
def in_preparation(model, stop):
    """The fault comes while the host brings the model to the device."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "stops", stop)
    yield model, {}


def left(model):
    """What a run left behind: objects of ours, functions on modules of the network."""
    gc.collect()
    ours = [one for one in gc.get_objects() if isinstance(one, (CacheRun, Engine, FeaturePass))]
    return ours + [module for module in model.model.diffusion_model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("place", [in_mid_block, in_the_sampler, in_guidance, in_preparation])
@pytest.mark.parametrize("name", SETTINGS)
def test_wherever_a_run_is_stopped_the_next_one_is_as_if_it_had_not_been(tiny_models, name, place):
    model = attach(tiny_models("sd3"), SETTINGS[name])
    gc.freeze()
    try:
        expected, evaluations = sample(model, "sd3", STEPS), last_report(model)["totals"]["evaluations"]
        for after in range(STEPS if place is not in_preparation else 1):
            fault = FAULTS[after % len(FAULTS)]
            with place(model, Stop(fault, after)) as (stopping, options):
                try:
                    sample(stopping, "sd3", STEPS, **options)
                    # Skipped evaluations run no block: there may be fewer of them than steps.
                    assert place is in_mid_block
                except fault as error:
                    assert "stopped" in str(error)
            assert left(model) == []
            assert torch.equal(sample(model, "sd3", STEPS), expected)
            assert last_report(model)["totals"]["evaluations"] == evaluations
    finally:
        gc.unfreeze()
