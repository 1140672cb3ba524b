"""Runs of a test bed's model on a Host: the graph that is posted, and what came back."""

import argparse
import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.beds import BEDS, node
from testbed.server import Host

MODEL_FILE = BEDS["mmdit"].weights.name
STEPS, CFG, SEED = 30, 4.5, 20
PRESETS = ("exact-looking", "balanced", "fast", "paper")  # of FasterCache


@dataclass(frozen=True)
class Run:
    """One way to sample: `nodes` are put on the model in order, each a (node id, inputs that differ
    from its defaults); `seed` is added to the seed; `steps_of` names the run whose cost sets the steps;
    `scheduler` None is the bed's own."""

    name: str
    nodes: tuple[tuple[str, dict[str, Any]], ...] = ()
    seed: int = 0
    steps: int = STEPS
    cfg: float = CFG
    steps_of: str = ""
    sampler: str = "euler"
    scheduler: str | None = None


@dataclass
class Result:
    """What one sampling gave: pictures [batch, frames * height, width, 3] in 0..1, its cost and its report.

    The frames of a clip lie one below the other, so that everything that works on pictures works on clips.
    """

    pictures: np.ndarray
    rows: int
    seconds: float
    report: dict[str, Any] | None


class Bench:
    """Samples the model of a bed, a name in BEDS, on a running Host."""

    def __init__(self, host: Host, bed: str = "mmdit") -> None:
        self.host, self.bed = host, BEDS[bed]
        self.known_defaults: dict[str, dict[str, Any]] = {}
        self.fresh = itertools.count()

    def sample(
        self,
        run: Run,
        prompts: Sequence[str],
        seed: int = SEED,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Result:
        """Sample all `prompts` as one batch."""
        workflow = self.workflow(run, prompts, seed + run.seed)
        outputs = self.host.run(workflow, on_progress)
        [array] = outputs["save"]["arrays"]
        frames = np.load(io.BytesIO(self.host.image(array)))  # [batch * frames, height, width, 3]
        report = outputs.get("report", {}).get("fastercache_report")
        return Result(
            frames.reshape(len(prompts), -1, *frames.shape[2:]),
            outputs["count"]["rows"][0],
            outputs["count"]["seconds"][0],
            json.loads(report[0]) if report else None,
        )

    def count_flops(self, run: Run, prompts: Sequence[str], seed: int = SEED) -> int:
        """Counted FLOPs of a run. Counting slows it down, so that its seconds mean nothing."""
        graph = self.workflow(run, prompts, seed)
        graph["model"]["inputs"]["flops"] = True
        return self.host.run(graph)["count"]["flops"][0]

    def workflow(self, run: Run, prompts: Sequence[str], seed: int) -> dict[str, Any]:
        """The API-format graph of one run."""
        graph = self.bed.graph(prompts) | {"model": node("CountRows", model=["load", 0], run=next(self.fresh))}
        for position, (kind, inputs) in enumerate(run.nodes):
            inputs = {**self.defaults(kind), **inputs, "model": [f"patch {position - 1}" if position else "model", 0]}
            graph[f"patch {position}"] = node(kind, **inputs)
        return graph | self.after_model(run, seed, [f"patch {len(run.nodes) - 1}" if run.nodes else "model", 0])

    def after_model(self, run: Run, seed: int, model: list[Any]) -> dict[str, Any]:
        """The part of the graph that samples `model`, and measures."""
        graph = {
            "sample": node(
                "KSampler",
                model=model,
                seed=seed,
                steps=run.steps,
                cfg=run.cfg,
                sampler_name=run.sampler,
                scheduler=run.scheduler or self.bed.scheduler,
                positive=["positive", 0],
                negative=["negative", 0],
                latent_image=["empty", 0],
                denoise=1.0,
            ),
            "count": node("RowCount", model=model, latent=["sample", 0]),
            "decode": self.bed.decoder(["sample", 0]),
            "save": node("SaveArray", images=["decode", 0]),
        }
        if any(kind.startswith("FasterCache") for kind, _ in run.nodes):
            graph["report"] = node("FasterCacheReport", model=model, latent=["sample", 0])
        return graph

    def defaults(self, kind: str) -> dict[str, Any]:
        """The default of every widget of a node, as the host declares them."""
        if kind not in self.known_defaults:
            inputs = self.host.object_info(kind)["input"]
            declared = {**inputs.get("required", {}), **inputs.get("optional", {})}
            self.known_defaults[kind] = {
                name: default for name, spec in declared.items() if (default := default_of(*spec)) is not None
            }
        return self.known_defaults[kind]


def default_of(kind: Any, options: dict[str, Any] | None = None) -> Any:
    """The default of one declared input: its own, else the first choice; None for a socket."""
    options = options or {}
    choices = kind if isinstance(kind, list) else options.get("options", [None])
    return options.get("default", choices[0])


def chosen_bed(program: str) -> str:
    """The bed that the command line of `program` names, mmdit without one."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--bed", choices=list(BEDS), default="mmdit", help="the model")
    return parser.parse_args().bed
