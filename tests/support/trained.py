"""Trained beds in this process: pictures of their prompts, and how near settings come to full sampling."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.sample
from fastercache_pack.fastercache_core.metrics import psnr
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.wrappers import attach
from torch import Tensor

from support.beds import skip_where_it_cannot_run
from support.runs import totals
from testbed.beds import BEDS

STEPS = 30


class Painter:
    """A bed's model with some of its prompts, sampled in one batch."""

    def __init__(self, bed: str = "mmdit", prompts: Sequence[str] = (), seed: int = 7) -> None:
        """prompts: six of those for tuning where none are given."""
        skip_where_it_cannot_run(bed)
        self.bed, self.seed = BEDS[bed], seed
        self.model = self.bed.load()
        self.prompts = prompts or self.bed.prompts("tuning")[:6]
        self._full: dict[Any, Tensor] = {}

    def paint(self, model: Any, steps: int = 0, cfg: float = 0.0, sampler: str = "euler") -> Tensor:
        """Pictures [prompts, 3, side, side] or clips [prompts, frames, 3, side, side], in 0..1.

        Steps and cfg are the bed's where none are given.
        """
        latent = self.bed.empty(len(self.prompts))
        noise = comfy.sample.prepare_noise(latent, self.seed)
        positive, negative = self.bed.conditioning(self.prompts), self.bed.conditioning([""])
        samples = comfy.sample.sample(
            model,
            noise,
            steps or self.bed.steps,
            cfg or self.bed.cfg,
            sampler,
            self.bed.scheduler,
            positive,
            negative,
            latent,
            seed=self.seed,
            disable_pbar=True,
        )
        return self.bed.decode(model, samples)

    def full(self, node: Callable[[Any], Any] | None = None, **options: Any) -> Tensor:
        """As `paint`, of the model itself, sampled once. node: puts another node on it."""
        key = (node, *sorted(options.items()))
        if key not in self._full:
            self._full[key] = self.paint(node(self.model.clone()) if node else self.model, **options)
        return self._full[key]

    def gain(
        self, settings: CacheSettings, node: Callable[[Any], Any] | None = None, **options: Any
    ) -> tuple[float, float]:
        """(dB above fewer steps at equal cost, cost) of `settings`, both against full sampling."""
        cached = attach(node(self.model.clone()) if node else self.model, settings)
        full, ours = self.full(node, **options), self.paint(cached, **options)
        steps = -(-options.get("steps", self.bed.steps) * totals(cached)["rows"] // totals(cached)["rows_full"])
        fewer = self.full(node, **{**options, "steps": steps})
        return decibels(ours, full) - decibels(fewer, full), totals(cached)["cost"]


def decibels(a: Tensor, b: Tensor) -> float:
    """Mean PSNR over pictures, 100 for equal ones."""
    return psnr(a, b).clamp(max=100.0).mean().item()
