"""Jobs of one picture on a bed, sampled in this process: stages, two experts, caches, and what each of them cost."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.tools.recording import load_model
from benchmarks.tools.usage_settings import Setting, Sigmas
from fastercache_core.actions import Action
from testbed.beds import BEDS
from testbed.pack import PACK, load_pack

ORDER = [action.value for action in Action]
# What samplers add on the way is drawn from another seed than the noise they begin with: on a CPU, ComfyUI up to 0.3.75
# draws the same twice.
OTHER_NOISE = 10_000


@dataclass(frozen=True)
class Job:
    """One picture or clip that somebody asks for."""

    setting: Setting
    prompt: str
    seed: int


@dataclass(frozen=True)
class Patch:
    """What is put on the model: a preset of FasterCache, or a cache of the host with its threshold."""

    kind: str
    value: str | float


@dataclass
class Painted:
    """A picture [1, 3, height, width] or clip [1, frames, 3, height, width] in 0..1, and what it took.

    actions: one letter an evaluation, the first one of the action of the branch that skipped most; "" without a report.
    """

    picture: Tensor
    rows: int
    actions: str


class Painter:
    """Samples jobs on a bed, a name in BEDS."""

    def __init__(self, bed: str) -> None:
        self.name, self.bed, self.model = bed, BEDS[bed], load_model(bed)
        self.conditioning = cache(lambda prompt: self.bed.conditioning([prompt]))

    def paint(self, job: Job, patch: Patch | None = None, steps: int | None = None) -> Painted:
        """A job in full, under a patch, or with another number of steps."""
        pack_module("nodes")
        from benchmarks.nodes import Counter

        setting, counter = job.setting, Counter(False)
        plan = setting.plan(steps or setting.steps, lambda n: self.sigmas(setting.sampler, n))
        latent, actions = self.bed.empty(1), ""
        for stage, (model, sigmas) in enumerate(zip(self.models(setting, patch, counter), plan)):
            latent = self.sample(model, job, stage, sigmas, latent)
            actions += letters(report_of(model))
        return Painted(self.bed.decode(self.model, latent), counter.rows, actions)

    def models(self, setting: Setting, patch: Patch | None, counter: Any) -> Iterator[Any]:
        """The model of every stage: experts are patched each, stages of lists are sampled with the same one."""
        model = patched(counted(self.model, counter), patch)
        for stage in range(setting.stages):
            yield patched(counted(self.model, counter), patch) if stage and not setting.lists else model

    def sample(self, model: Any, job: Job, stage: int, sigmas: Sigmas, latent: Tensor) -> Tensor:
        """One stage, from what the stage before it left."""
        import comfy.sample
        import comfy.samplers

        setting, seed = job.setting, job.seed + stage
        fresh = stage == 0 or bool(setting.lists)
        noise = comfy.sample.prepare_noise(latent, seed) if fresh else torch.zeros_like(latent)
        sampler = comfy.samplers.sampler_object(setting.sampler)
        conds = self.conditioning(job.prompt), self.conditioning("")
        inputs = noise, setting.cfg, sampler, torch.tensor(sigmas), *conds, latent
        return comfy.sample.sample_custom(model, *inputs, disable_pbar=True, seed=seed + OTHER_NOISE)

    def sigmas(self, sampler: str, steps: int) -> Sigmas:
        """What the host's KSampler walks through with its scheduler `simple`."""
        import comfy.samplers

        return comfy.samplers.KSampler(self.model, steps, "cpu", sampler, "simple").sigmas.tolist()


def counted(model: Any, counter: Any) -> Any:
    """A clone of a model whose rows are counted below every cache."""
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "benchmark", counter.outer_sample)
    return model


def patched(model: Any, patch: Patch | None) -> Any:
    """A model under a patch; every other input of the node is at its default."""
    if patch is None:
        return model
    if patch.kind == "FasterCache":
        return with_node(model, preset=patch.value)
    from comfy_extras import nodes_easycache

    node = getattr(nodes_easycache, f"{patch.kind}Node")
    return node.execute(model, **{**defaults(node), "reuse_threshold": patch.value}).result[0]


def with_node(model: Any, **inputs: Any) -> Any:
    """A model under the node FasterCache with some of its inputs, the others at their defaults."""
    pack = pack_module("nodes.fastercache")
    node = type("FasterCache", (pack.FasterCache,), {"hidden": SimpleNamespace(unique_id=None)})
    return node.execute(model, **{**defaults(node), **inputs}).result[0]


def targets() -> Mapping[str, float]:
    """{preset: target PSNR in dB} of the pack."""
    return pack_module("nodes.fastercache").CLOSENESS


def pack_module(name: str) -> Any:
    """A module of the pack as the host loads it."""
    import utils.extra_config  # noqa: F401  (ComfyUI's nodes.py later hides its own `utils` package)

    load_pack()
    return importlib.import_module(f"{PACK}.{name}")


def defaults(node: Any) -> dict[str, Any]:
    """{input: default} of a node's widgets."""
    inputs = [entry for entry in node.define_schema().inputs if hasattr(entry, "default")]
    return {entry.id: default_of(entry) for entry in inputs}


def default_of(entry: Any) -> Any:
    """The default of an input: its own, else its first choice."""
    options = getattr(entry, "options", None)
    return options[0] if entry.default is None and options else entry.default


def report_of(model: Any) -> Mapping[str, Any] | None:
    """The pack's report of a model's last run, None where the pack is not on it."""
    return pack_module("nodes.host.wrappers").last_report(model)


def letters(report: Mapping[str, Any] | None) -> str:
    """One letter for every evaluation of a report, "" for none."""
    evaluations = report["evaluations"] if report else []
    return "".join(max(one["actions"].values(), key=ORDER.index, default=ORDER[0])[0] for one in evaluations)
