"""What an estimate costs on a skipped evaluation, beyond the conditional pass: next to nothing."""

import comfy.model_sampling
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from fastercache_pack.fastercache_core.forecast import FORECASTERS
from fastercache_pack.fastercache_core.paper_weights import WEIGHTS
from fastercache_pack.fastercache_core.signal import DifferenceSettings
from fastercache_pack.nodes.host.prediction import OutputSpace
from fastercache_pack.nodes.host.wrappers import attach
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from support import tiny
from support.guidance import cfg_cache
from support.runs import estimated

SHAPE = (1, 16, 64, 64)
SIZE = 16 * 64 * 64
# Views move no data; they only say how it is looked at.
# fmt: off
VIEWS = {"view", "reshape", "expand", "unsqueeze", "squeeze", "slice", "select", "detach", "alias", "t", "transpose",
         "permute", "_unsafe_view", "split", "unbind", "chunk", "as_strided", "split_with_sizes"}
# These look only at what kind of a tensor they are given.
MAKERS = {"new_zeros", "new_empty", "new_ones", "new_full"}
TRANSFORMS = ("fft2", "ifft2", "fftn", "ifftn", "rfft2", "irfft2", "rfftn", "irfftn", "fft", "ifft", "rfft", "irfft")
# fmt: on


class Traffic(TorchDispatchMode):
    """Counts, for what runs under it, the bytes read and written and the operations by name."""

    def __init__(self):
        super().__init__()
        self.bytes, self.names, self.large = 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            seen = output if name in MAKERS else (args, kwargs, output)
            tensors = [t for t in tree_leaves(seen) if isinstance(t, torch.Tensor)]
            self.names.append(name)
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            self.large += [name] * any(t.numel() >= SIZE for t in tensors)
        return output


def estimator(forecast="fitted", weights="none", bands=2):
    """A function that fills in the unconditional result as a skipped evaluation does, after five computed ones."""
    sampling = type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    signal = DifferenceSettings(forecast, weights, bands=bands).signal(sampling.percent_to_sigma)
    g = torch.Generator().manual_seed(1)
    for sigma in (1.0, 0.9, 0.8, 0.7, 0.6):
        signal.observe(sigma, torch.randn(SHAPE, generator=g))
    assert signal.ready
    cond = torch.randn(SHAPE, generator=g)
    space = OutputSpace(sampling, torch.tensor([0.5]), torch.randn(SHAPE, generator=g))
    return lambda: signal.predict(0.5, cond, space.scale)


@pytest.fixture(scope="module")
def network_pass():
    """One conditional pass of a mid-size network of the host: an SD3 of 6 blocks, 384 wide, on 1024 tokens.

    Real ones have 24 blocks and more, 1536 wide: over fifty times the work.
    """
    spec = tiny.SPECS["sd3"]
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 384}}
    sizes = {"depth": 6, "num_patches": 1024, "pos_embed_max_size": 32, "context_embedder_config": embedder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SPECS, "sd3 mid", {**spec, "cfg": {**spec["cfg"], **sizes}})
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


def flops(function):
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        function()
    return counted.get_total_flops()


@pytest.fixture(scope="module")
def pass_costs(network_pass):
    """(bytes moved, floating point operations) of a pass."""
    return traffic(network_pass).bytes, flops(network_pass)


@pytest.mark.parametrize("forecast", FORECASTERS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_estimate_takes_at_most_a_hundredth_of_the_work_of_a_pass(pass_costs, forecast, weights):
    """Counted, not timed: what else this machine does is of no concern."""
    estimate, (pass_bytes, pass_flops) = estimator(forecast, weights), pass_costs
    assert 0 < traffic(estimate).bytes <= 0.01 * pass_bytes
    assert 0 < flops(estimate) <= 0.001 * pass_flops


@pytest.mark.parametrize("bands", [1, 2, 4])
@pytest.mark.parametrize("forecast", FORECASTERS)
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


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_skipped_evaluation_runs_no_transform_and_no_further_network_call(tiny_models, monkeypatch, weights):
    settings = cfg_cache(forecast="fitted" if weights == "none" else "hold", weights=weights)
    model = attach(tiny_models("sd3"), settings)
    watch = Watch(model, monkeypatch)
    try:
        tiny.sample(model, "sd3", steps=12, latent=torch.zeros(2, 16, 8, 8))
    finally:
        watch.hook.remove()
    skipped = [seen for seen, skip in zip(watch.evaluations, estimated(model)) if skip]
    full = [seen for seen, skip in zip(watch.evaluations, estimated(model)) if not skip]
    assert len(skipped) >= 4 and len(watch.evaluations) == 12
    assert all(seen == {"transforms": 0, "rows": 2, "calls": 1} for seen in skipped)
    assert all(seen["transforms"] > 0 and seen["rows"] == 4 for seen in full), "the watch does see transforms"
