"""Whole runs beside ports of the published code: the nodes as they come, and the papers' own recipe, on a tiny UNet.

A port stands in the host's place for one call of the network. It keeps its own caches on the modules and its own
counter of steps, as the published scripts do.
"""

import pytest
import torch
from fastercache_pack.nodes.cfg_cache import FasterCacheCFG
from fastercache_pack.nodes.fastercache import FasterCache
from fastercache_pack.nodes.frdiff import FasterCacheFRDiff

from host.test_chains import on
from support.runs import actions, relative
from support.tiny import sample

STEPS, LATENT = 24, (1, 4, 8, 8)


def run(model, steps=STEPS):
    return sample(model, "sd15", steps=steps, latent=torch.zeros(LATENT))


def modules(model, name):
    network = model.model.diffusion_model
    return [m for m in network.modules() if type(m).__name__ == name]


class Cached:
    """A module whose `forward` is computed and kept, or taken from what was kept: [older, newest] outputs."""

    def __init__(self, module, residual=False):
        self.module, self.forward, self.residual = module, module.forward, residual
        self.past, self.reuses, self.w = [], False, 0.0

    def __call__(self, x, *args, **kwargs):
        base = x if self.residual else 0.0
        if self.reuses:
            older, newest = self.past
            return base + newest + (newest - older) * self.w
        output = self.forward(x, *args, **kwargs)
        kept = output - base
        # of both rows the first, of one that one: the conditional row is run first
        self.past = [*(self.past or [kept]), kept][-2:]
        return output

    def __enter__(self):
        self.module.forward = self
        return self

    def __exit__(self, *_):
        del self.module.forward


class FRDiffPort:
    """Keyframes every M; between them lambda * reuse + (1 - lambda) * held, of the noise that the network predicts."""

    def __init__(self, model, every, steps=STEPS, tau=30.0, bias=0.5):
        self.every, self.steps, self.tau, self.bias, self.i = every, steps, tau, bias, -1
        blocks = [Cached(block.in_layers) for block in modules(model, "ResBlock") if not block.updown]
        self.caches = [*blocks, *(Cached(m, residual=True) for m in modules(model, "SpatialTransformer"))]
        self.held = None

    def __call__(self, apply_model, args):
        self.i += 1
        x, sigma = args["input"], args["timestep"].view(-1, 1, 1, 1)
        share = min(max((self.tau * (self.i / self.steps - self.bias) + 2) / 4, 0.0), 1.0)
        key = self.i % self.every == 0
        if not key and share < 1e-10:
            return x - sigma * self.held
        for cache in self.caches:
            cache.reuses = not key
        noise = (x - apply_model(x, args["timestep"], **args["c"])) / sigma
        if key:
            self.held = noise
            return x - sigma * noise
        return x - sigma * (share * noise + (1 - share) * self.held)


def ported(model, port):
    """A run in which `port` takes the place of the network."""
    model.set_model_unet_function_wrapper(port)
    try:
        for cache in port.caches:
            cache.__enter__()
        return run(model)
    finally:
        for cache in port.caches:
            cache.__exit__()


@pytest.mark.parametrize("every", [2, 3])
def test_frdiff_as_it_comes_is_the_released_code(tiny_models, every):
    model = on(tiny_models("sd15"), FasterCacheFRDiff, interval=every, skip_last=True)
    ours = run(model)
    theirs = ported(tiny_models("sd15"), FRDiffPort(tiny_models("sd15"), every))
    assert {"computed", "predicted", "mixed", "reused"} == set(actions(model))
    assert relative(ours, theirs) < 1e-4 < relative(ours, run(tiny_models("sd15")))


class FasterCachePort:
    """Eq. 5 on self-attention where the conditional row runs alone, and the released CFG-Cache on the output.

    estimated: for every step, whether the unconditional row is skipped; w: of eq. 5; factors, low_last, high_first:
    of CFG-Cache, in steps from 1 on.
    """

    def __init__(self, model, estimated, every, w, factors, low_last, high_first):
        self.estimated, self.every, self.w, self.factors = estimated, every, w, factors
        self.low_last, self.high_first = low_last, high_first
        self.i, self.computed_at = -1, None
        self.caches = [Cached(block.attn1) for block in modules(model, "BasicTransformerBlock")]

    def __call__(self, apply_model, args):
        self.i += 1
        x, t, rows = args["input"], args["timestep"], args["cond_or_uncond"]
        sigma, cond = t.view(-1, 1, 1, 1), rows.index(0)
        skips = self.estimated[self.i]
        reuses = skips and self.i - self.computed_at < self.every
        for cache in self.caches:
            cache.reuses, cache.w = reuses, self.w
            cache.past = [p[cond : cond + 1] if len(p) > 1 else p for p in cache.past]
        if not reuses:
            self.computed_at = self.i
        if not skips:
            noise = (x - apply_model(x, t, **args["c"])) / sigma
            change = noise[1 - cond] - noise[cond]
            self.low, self.high = self._bands(change)
            return x - sigma * noise
        own = {k: v[cond : cond + 1] if torch.is_tensor(v) and len(v) == 2 else v for k, v in args["c"].items()}
        options = own.get("transformer_options", {})
        own["transformer_options"] = {**options, "cond_or_uncond": [0]}
        noise = (x[cond : cond + 1] - apply_model(x[cond : cond + 1], t[:1], **own)) / sigma[:1]
        k = self.i + 1
        self.low = self.low * self.factors[0] if k <= self.low_last else self.low
        self.high = self.high * self.factors[1] if k >= self.high_first else self.high
        change = torch.fft.ifft2(torch.fft.ifftshift(self.low + self.high, dim=(-2, -1))).real
        both = [noise[0], noise[0] + change.float()]
        return x - sigma * torch.stack([both[row != 0] for row in rows])

    @staticmethod
    def _bands(change):
        spectrum = torch.fft.fftshift(torch.fft.fft2(change.double()), dim=(-2, -1))
        height, width = change.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        low = (x - width // 2) ** 2 + (y - height // 2) ** 2 <= (min(height, width) // 5) ** 2
        return spectrum * low, spectrum * ~low


@pytest.mark.parametrize("chained", [False, True], ids=["preset paper", "two nodes"])
def test_fastercache_with_the_released_weights_is_the_cogvideox_script(tiny_models, chained):
    """24 steps in place of its 50, so that all of its fractions count."""
    if chained:
        part = {"reuse_interval": 3, "reuse_weight": 0.3, "reuse_start_percent": 0.33, "reuse_end_percent": 1.0}
        features = {"preset": "none", "feature_reuse": "constant", "reuse_depth": "attention", **part}
        weights = {"weights": "released", "forecast": "hold", "tolerance": 0.0, "interval": 5, "start_percent": 0.33}
        model = on(on(tiny_models("sd15"), FasterCache, **features), FasterCacheCFG, **weights)
    else:
        model = on(tiny_models("sd15"), FasterCache, preset="paper", published="CogVideoX")
    ours = run(model)
    estimated = [action == "estimated" for action in actions(model, "uncond")]
    assert sum(estimated) >= 10 and "reused" in actions(model)
    # by the model's own timesteps, of which its steps are evenly spaced parts
    grid = [i / STEPS for i in range(STEPS)]
    low_last, high_first = sum(p <= 0.79 for p in grid), sum(p < 0.57 for p in grid) + 1
    port = FasterCachePort(tiny_models("sd15"), estimated, 3, 0.3, (1.1, 1.1), low_last, high_first)
    assert relative(ours, ported(tiny_models("sd15"), port)) < 1e-3 < relative(ours, run(tiny_models("sd15")))
