"""What is tried beside this pack for docs/beside-others.md: features of the host, and stand-ins for other packs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_custom_sampler,
    nodes_easycache,
    nodes_eps,
    nodes_fresca,
    nodes_lumina2,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_slg,
    nodes_tcfg,
)
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Interval
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.wrappers import attach

from support.guidance import windowed, with_steps
from support.others import CACHES, Memory, Named, Scheduled, in_tiles, in_windows
from support.runs import evaluations, notes, totals
from support.tiny import SPECS, conditioning

STEPS = 16
SKIPPING = with_steps()  # whatever the error: what is allowed is done
FEATURES = CacheSettings("features", reuse=ReuseSettings({"self": Interval(2)}, "hold"))
PAGE = "docs/beside-others.md"


def cfg_guider(model: Any) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(4.0)
    return guider


@dataclass(frozen=True)
class Case:
    """One row. put: puts the other on a MODEL; guider: makes a GUIDER of it; conds: what that is given."""

    family: str = "sd3"
    put: Callable[[Any], Any] = lambda model: model
    guider: Callable[[Any], Any] = cfg_guider
    settings: CacheSettings = SKIPPING
    shape: tuple[int, ...] = ()
    sampler: Any = "euler"
    sigmas: torch.Tensor | None = None

    def outcome(self, build: Callable[[str], Any]) -> str:
        """What comes of it: "works", or "stands down" with the reason. build: a tiny MODEL by family."""
        model = attach(self.put(build(self.family)), self.settings)
        self.sample(model)
        skipped = set(evaluations(model)) != {"computed"} or totals(model)["cost"] < 1.0
        told = [note for note in notes(model) if note == messages.EASYCACHE or "answered in place" in note]
        reasons = told or ([] if skipped else notes(model))
        return f"stands down: {reasons[0]}" if reasons else "works"

    def sample(self, model: Any) -> torch.Tensor:
        """The latent of a run."""
        guider = self.guider(model)
        if not guider.original_conds:
            guider.set_conds(conditioning(self.family, 1), conditioning(self.family, 2))
        shape = self.shape or (1, *SPECS[self.family]["lat"])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        sigmas = self.sigmas
        if sigmas is None:
            sampling = model.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
        sampler = comfy.samplers.sampler_object(self.sampler) if isinstance(self.sampler, str) else self.sampler
        return guider.sample(noise, torch.zeros(shape), sampler, sigmas, disable_pbar=True, seed=3)


def node(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What puts a node of the host on a MODEL."""

    def put(model: Any) -> Any:
        result = run(model)
        return (result.result if hasattr(result, "result") else result)[0]

    return put


def cache(kind: str) -> Callable[[Any], Any]:
    """What puts a cache on a MODEL."""

    def put(model: Any) -> Any:
        CACHES[kind](model, Memory())
        return model

    return put


def third_guider(make: Callable[[Any, Any, Any, Any], Any]) -> Callable[[Any], Any]:
    """A guider of three prompts."""
    return lambda model: make(model, *(conditioning("sd15", seed) for seed in (1, 2, 5))).result[0]


def lying(lie: float) -> Any:
    """A sampler around euler that asks the model at other noise levels."""

    def around(model: Any, x: Any, sigmas: Any, *, inner: Any, extra_args: Any, callback: Any, disable: Any) -> Any:
        def lied(x: Any, sigma: Any, **kwargs: Any) -> Any:
            return model(x, sigma * lie if sigma[0] < 1 else sigma, **kwargs)

        lied.inner_model = model.inner_model  # type: ignore[attr-defined]
        return inner.sampler_function(lied, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    return comfy.samplers.KSAMPLER(around, {"inner": comfy.samplers.sampler_object("euler")})


def elsewhere(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Any:
    """A sampler that nobody knows."""
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma * x.new_ones([len(x)]), **extra_args)) / sigma * (following - sigma)
    return x


VIDEO, CLIP = (1, 16, 6, 8, 8), (6, 16, 8, 8)
CASES = {
    "Guidance": {
        "APG": Case("sd15", node(lambda m: nodes_apg.APG.execute(m, 1.0, 5.0, -0.5))),
        "TCFG": Case("sd15", node(lambda m: nodes_tcfg.TCFG.execute(m))),
        "CFGZeroStar": Case(put=node(lambda m: nodes_cfg.CFGZeroStar.execute(m))),
        "CFGNorm": Case(put=node(lambda m: nodes_cfg.CFGNorm.execute(m, 1.0))),
        "Mahiro": Case("sd15", node(lambda m: nodes_mahiro.Mahiro.execute(m))),
        "FreSca": Case("sd15", node(lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.25, 4))),
        "RenormCFG": Case("sd15", node(lambda m: nodes_lumina2.RenormCFG.execute(m, 100.0, 1.0))),
        "EpsilonScaling": Case("sd15", node(lambda m: nodes_eps.EpsilonScaling.execute(m, 1.005))),
        "RescaleCFG": Case("sd15", node(lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7))),
        "Perturbed-attention guidance": Case(
            "sd15", node(lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0))
        ),
        "Self-attention guidance": Case("sd15", node(lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0))),
        "Skip-layer guidance (SkipLayerGuidanceDiT)": Case(
            put=node(lambda m: nodes_slg.SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "1", ""))
        ),
        "SkipLayerGuidanceDiTSimple, which runs the branches one by one": Case(
            put=node(lambda m: nodes_slg.SkipLayerGuidanceDiTSimple.execute(m, 0.0, 1.0, "1", ""))
        ),
        "DualCFGGuider": Case(
            "sd15",
            guider=third_guider(
                lambda m, a, b, c: nodes_custom_sampler.DualCFGGuider.execute(m, a, c, b, 4.0, 3.0, "regular")
            ),
        ),
        "PerpNegGuider": Case(
            "sd15", guider=third_guider(lambda m, a, b, c: nodes_perpneg.PerpNegGuider.execute(m, a, b, c, 4.0, 1.0))
        ),
        "A guider with a scale of its own at every step (KJNodes ScheduledCFGGuidance)": Case(guider=Scheduled),
        "A guider that names its conditionings in its own way (RES4LYF)": Case(guider=Named),
    },
    "Windows and tiles": {
        "Context windows of ComfyUI that stay": Case("wan", windowed, shape=VIDEO),
        "Context windows of ComfyUI that move": Case("wan", lambda m: windowed(m, "standard_uniform"), shape=VIDEO),
        "Context windows of AnimateDiff-Evolved": Case(put=in_windows("its own", dim=0), shape=CLIP),
        "Context windows that nothing tells of": Case(put=in_windows("nowhere", moving=True, dim=0), shape=CLIP),
        "Tiles within a step (TiledDiffusion)": Case(put=lambda m: in_tiles(m, False)),
        "Tiles within a step, with feature reuse": Case(put=lambda m: in_tiles(m, False), settings=FEATURES),
        "Tiles that move from step to step, with feature reuse (SpotDiffusion)": Case(
            put=lambda m: in_tiles(m, True), settings=FEATURES
        ),
    },
    "Other caches": {
        "EasyCache": Case("flux", node(lambda m: nodes_easycache.EasyCacheNode.execute(m, 0.2, 0.15, 0.95, False))),
        "LazyCache": Case(put=node(lambda m: nodes_easycache.LazyCacheNode.execute(m, 0.2, 0.15, 0.95, False))),
        "One around the host's call of the network (Spectrum for SDXL)": Case(put=cache("function wrapper")),
        "One around APPLY_MODEL": Case(put=cache("APPLY_MODEL")),
        "One around DIFFUSION_MODEL (CacheDiT)": Case("flux", cache("DIFFUSION_MODEL")),
        "One around PREDICT_NOISE (other ports of Spectrum)": Case(put=cache("PREDICT_NOISE")),
        "One around all branches": Case(put=cache("branches")),
        "One in place of the blocks (TeaCache, MagCache)": Case(put=cache("blocks")),
        "One in place of the list of blocks (First Block Cache of WaveSpeed)": Case(put=cache("list of blocks")),
    },
    "Samplers": {
        "A sampler around a known one (Detail Daemon, LyingSigma)": Case(sampler=lying(0.97)),
        "A sampler of another pack (RES4LYF)": Case(sampler=comfy.samplers.KSAMPLER(elsewhere)),
        "One step at a time (Impact RegionalSampler)": Case(sigmas=torch.tensor([0.6, 0.5])),
        "From less noise to more (unsampling)": Case(sigmas=torch.linspace(0.05, 1.0, 17)),
    },
}

HEAD = """# Beside other nodes

What happens beside features of ComfyUI and nodes of other packs on the same model. The rows are what small runs showed:
tests/host/test_beside_others.py makes them again and compares. Other packs are represented by stand-ins that do what
they do, since what a node does counts, not its name. *Works* means that steps, passes or features are skipped; how many
depends on the errors. *Stands down* means that everything is computed, with the reason in the report.

Three rules hold for all of them. How strongly a guider weighs its conditionings is measured by what it makes of them,
at every step. A part of the latent that cannot be told from others is computed. Where another node answers in place of
the network, this pack makes way.
"""
FOOT = """
## Tried by hand

Real packs on the trained test models, ComfyUI 0.3.75, two prompts, 30 steps, cfg 4.5, preset *balanced*, PSNR to full
sampling in dB.

| pack | alone | with this pack, before it was noticed | with this pack | this pack alone |
|---|---|---|---|---|
| TeaCache (Wan) | 24.9 | 22.0 | 25.2 | 57.0 |
| MagCache (Wan) | 38.5 | 35.4 | 38.5 | 57.0 |
| Spectrum for SDXL (UNet) | 27.3 | 24.6 | 28.4 | 49.5 |
| Spectrum for SDXL (MMDiT) | 21.4 | 21.4 | 27.5 | 48.3 |
| First Block Cache of WaveSpeed (MMDiT) | 40.3 | 42.5 | 42.5 | 48.3 |
| First Block Cache of WaveSpeed (UNet) | 40.8 | 49.7 | 49.7 | 49.5 |

Impact Pack, Ultimate SD Upscale, Efficiency Nodes, Inspire Pack, KJNodes (ScheduledCFG, WanNAG, EnhanceAVideo),
Skimmed CFG, AutomaticCFG, PLADIS, HyperTile, DeepShrink and Detail Daemon were tried with an earlier version: they
work.

## Not tried

ComfyUI-MultiGPU, Nunchaku, WanVideoWrapper and other packs with samplers and models of their own, T-GATE, DeepCache,
TaylorSeer, StableFast, TensorRT.
"""


def row(name: str, outcome: str) -> str:
    """A row of the page."""
    return f"| {name} | {outcome} |"
