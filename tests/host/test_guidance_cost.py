"""What an estimate costs on a skipped evaluation, beyond the conditional pass: next to nothing."""
import time
from statistics import median

import comfy.model_sampling
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from fastercache_pack.fastercache_core.clock import Clock
from fastercache_pack.fastercache_core.guidance import GuidanceCache, GuidanceSettings
from fastercache_pack.fastercache_core.measured import FORECAST_NAMES
from fastercache_pack.fastercache_core.schedule import Interval
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.attach import attach, last_report
from fastercache_pack.nodes.host.output_space import OutputSpace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPE = (1, 16, 64, 64)
SIZE = 16 * 64 * 64
# Views move no data; they only say how it is looked at.
VIEWS = {"view", "reshape", "expand", "unsqueeze", "squeeze", "slice", "select", "detach", "alias", "t", "transpose",
         "permute", "_unsafe_view", "split", "unbind", "chunk", "as_strided", "split_with_sizes"}
TRANSFORMS = ("fft2", "ifft2", "fftn", "ifftn", "rfft2", "irfft2", "rfftn", "irfftn", "fft", "ifft", "rfft", "irfft")


class Traffic(TorchDispatchMode):
    """Counts, for what runs under it, the bytes read and written and the operations by name."""

    def __init__(self):
        super().__init__()
        self.bytes, self.names, self.large = 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor)]
            self.names.append(name)
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            self.large += [name] * any(t.numel() >= SIZE for t in tensors)
        return output


def estimator(forecast="measured", weights="none", bands=2):
    """A function that fills in the unconditional result as a skipped evaluation does, after five full ones."""
    sampling = type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    cache = GuidanceCache(GuidanceSettings(Interval(2), forecast, weights, bands=bands), sampling.percent_to_sigma)
    clock, g = Clock([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.0]), torch.Generator().manual_seed(1)
    for sigma in (1.0, 0.9, 0.8, 0.7, 0.6):
        cache.observe(clock.tick(sigma), torch.randn(SHAPE, generator=g))
    evaluation, sigma = clock.tick(0.5), torch.tensor([0.5])
    assert cache.may_estimate(evaluation)
    cond = torch.randn(SHAPE, generator=g)
    space = OutputSpace(sampling, sigma, torch.randn(SHAPE, generator=g))
    return lambda: cache.estimate(evaluation, cond, space.scale)


@pytest.fixture(scope="module")
def network_pass():
    """One conditional pass of a mid-size network of the host: an SD3 of 6 blocks, 384 wide, on 1024 tokens.

    Real ones have 24 blocks and more, 1536 wide: over fifty times the work.
    """
    spec = tiny.SPECS["sd3"]
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 384}}
    config = {**spec["cfg"], "depth": 6, "num_patches": 1024, "pos_embed_max_size": 32,
              "context_embedder_config": embedder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SPECS, "sd3 mid", {**spec, "cfg": config})
        network = tiny.build("sd3 mid").model.diffusion_model
    inputs = (torch.randn(SHAPE), torch.tensor([500.0]))
    conds = dict(context=torch.randn(1, 77, 64), y=torch.randn(1, 2048))

    def run():
        with torch.no_grad():
            return network(*inputs, **conds)

    assert run().shape == SHAPE
    return run


def traffic(function):
    with torch.no_grad(), Traffic() as counted:
        function()
    return counted


@pytest.fixture(scope="module")
def pass_bytes(network_pass):
    return traffic(network_pass).bytes


@pytest.mark.parametrize("forecast", FORECAST_NAMES)
@pytest.mark.parametrize("weights", ["none", "paper", "released"])
def test_the_estimate_moves_at_most_a_hundredth_of_the_bytes_of_a_pass(pass_bytes, forecast, weights):
    assert traffic(estimator(forecast, weights)).bytes <= 0.01 * pass_bytes


def test_the_estimate_takes_at_most_a_hundredth_of_the_time_of_a_pass(network_pass):
    def seconds(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    estimate = estimator()
    estimate()
    assert median(seconds(estimate) for _ in range(15)) <= 0.01 * min(seconds(network_pass) for _ in range(2))


@pytest.mark.parametrize("bands", [1, 2, 4])
@pytest.mark.parametrize("forecast", FORECAST_NAMES)
def test_the_estimate_is_one_operation_on_the_latent_and_waits_for_nothing(forecast, bands):
    counted = traffic(estimator(forecast, bands=bands))
    assert counted.large == ["baddbmm"]
    assert len(counted.names) <= 12, "small operations: every one is a call to the device"
    assert "_local_scalar_dense" not in counted.names, "nothing waits for the device"


class Watch:
    """Per evaluation of a run: Fourier transforms, and rows that went through the network."""

    def __init__(self, model, monkeypatch):
        self.evaluations = []
        for name in TRANSFORMS:
            monkeypatch.setattr(torch.fft, name, self.counting(getattr(torch.fft, name)))
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", self.predict_noise)
        self.hook = model.model.diffusion_model.register_forward_pre_hook(self.forward)

    def counting(self, transform):
        def counted(*args, **kwargs):
            self.evaluations[-1]["transforms"] += 1
            return transform(*args, **kwargs)
        return counted

    def predict_noise(self, executor, *args, **kwargs):
        self.evaluations.append({"transforms": 0, "rows": 0, "calls": 0})
        return executor(*args, **kwargs)

    def forward(self, _, args):
        self.evaluations[-1]["rows"] += args[0].shape[0]
        self.evaluations[-1]["calls"] += 1


@pytest.mark.parametrize("weights", ["none", "paper", "released"])
def test_a_skipped_evaluation_runs_no_transform_and_no_further_network_call(tiny_models, monkeypatch, weights):
    settings = CacheSettings("cfg", GuidanceSettings(Interval(2), "measured" if weights == "none" else "hold", weights))
    model = attach(tiny_models("sd3"), settings)
    watch = Watch(model, monkeypatch)
    try:
        tiny.sample(model, "sd3", steps=12, latent=torch.zeros(2, 16, 8, 8))
    finally:
        watch.hook.remove()
    records = last_report(model)["evaluations"]
    skipped = [seen for seen, r in zip(watch.evaluations, records) if "ESTIMATE" in r["actions"].values()]
    full = [seen for seen, r in zip(watch.evaluations, records) if "ESTIMATE" not in r["actions"].values()]
    assert len(skipped) >= 4 and len(watch.evaluations) == 12
    assert all(seen == {"transforms": 0, "rows": 2, "calls": 1} for seen in skipped)
    assert all(seen["transforms"] > 0 and seen["rows"] == 4 for seen in full), "the watch does see transforms"
