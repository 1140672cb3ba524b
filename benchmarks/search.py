"""Searches a policy by sampling with candidates, in as many processes and on as many machines as you like, with Optuna.

    pip install optuna
    python dev.py bench search --bed mmdit --budget 0.5 --trials 40 --storage search.journal

What a recorded run cannot tell is how much an error grows until the end, and that is all that is searched: a few
factors over the run by which errors there count more or less. For each set of them exact search gives the best policy,
which is then fitted on tuning prompts and sampled on other ones. The first trial is the policy of exact search itself.
Every process has a host of its own and asks the study for a trial, tells the result, and asks again; they only share
the journal file (on another machine: over a network folder). Writes output/search/NAME.json, for FasterCache Policy
Load, and prints how close its pictures are on report prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from benchmarks.tools.recording import load_model
from benchmarks.tools.sampling import SEED
from fastercache_core.metrics import psnr
from testbed.beds import BEDS
from testbed.pack import load_pack
from testbed.server import ROOT, plain_errors

if TYPE_CHECKING:
    from fastercache_pack.fastercache_core.calibration.policy import Policy

KNOTS = 6  # factors by which errors count, evenly over the run; the last is one
RANGE = 2.0  # each from exp(-RANGE) to exp(RANGE)
OUTPUT = ROOT / "output" / "search"


@dataclass(frozen=True)
class Task:
    """What is searched. pictures: prompts to fit on, and as many others to compare on."""

    bed: str
    steps: int
    cfg: float
    budget: float
    pictures: int

    @property
    def name(self) -> str:
        """Of the study, and of the policy's file."""
        return f"{self.bed} {self.steps} steps cfg {self.cfg:g} at {self.budget:g}"


class Laboratory:
    """Finds and samples policies on the model of a Task."""

    def __init__(self, task: Task) -> None:
        self.task, self.bed, self.model = task, BEDS[task.bed], load_model(task.bed)
        import utils.extra_config  # noqa: F401  (ComfyUI's nodes.py later hides its own `utils` package)

        load_pack()
        from fastercache_pack.nodes.host.calibrate import recorded

        tuning = self.bed.prompts("tuning")
        self.others = tuning[task.pictures : 2 * task.pictures]
        self.sampling = self._sampling(tuning[: task.pictures])
        self.reference, self.losses = recorded(self.model, self.sampling)
        self.full: dict[tuple[str, ...], Tensor] = {}

    def policy(self, logarithms: Sequence[float]) -> Policy:
        """The policy that exact search finds where errors count as `logarithms` say (KNOTS - 1 of factors)."""
        from fastercache_pack.fastercache_core.calibration.search import find_points
        from fastercache_pack.nodes.host.calibrate import chosen

        losses = self.losses.scaled(growth(logarithms, self.losses.count).tolist())
        points = find_points(self.reference, losses)
        return chosen(self.model, self.sampling, self.reference, points, self.task.budget)

    def decibels(self, policy: Policy, prompts: Sequence[str]) -> float:
        """Mean PSNR to full sampling of `prompts` under a policy."""
        from fastercache_pack.fastercache_core.features.storage import StorageSettings
        from fastercache_pack.nodes.frdiff import policy_settings
        from fastercache_pack.nodes.host.wrappers import attach

        if tuple(prompts) not in self.full:
            self.full[tuple(prompts)] = self._pictures(self.model, prompts)
        cached = attach(self.model, policy_settings(policy, StorageSettings()))
        return float(psnr(self._pictures(cached, prompts), self.full[tuple(prompts)]).mean())

    def _pictures(self, model: Any, prompts: Sequence[str]) -> Tensor:
        import comfy.sample

        run, seed = self._sampling(prompts), SEED + 1
        noise = comfy.sample.prepare_noise(run.latent, seed)
        inputs = run.steps, run.cfg, run.sampler, run.scheduler, run.positive, run.negative, run.latent
        samples = comfy.sample.sample(model, noise, *inputs, seed=seed, disable_pbar=True)
        return self.bed.decode(self.model, samples)

    def _sampling(self, prompts: Sequence[str]) -> Any:
        from fastercache_pack.nodes.host.calibrate import Sampling

        task, bed = self.task, self.bed
        latent, positive, negative = bed.empty(len(prompts)), bed.conditioning(list(prompts)), bed.conditioning([""])
        return Sampling(positive, negative, latent, SEED, task.steps, task.cfg, "euler", bed.scheduler)


def growth(logarithms: Sequence[float], count: int) -> np.ndarray:
    """By how much errors of `count` evaluations count: through the KNOTS, in logarithms; 1 at the last."""
    places = np.linspace(0, 1, count)
    return np.exp(np.interp(places, np.linspace(0, 1, KNOTS), [*logarithms, 0.0]))


def shared_study(optuna: Any, storage: Path, name: str) -> Any:
    """The study in the journal file `storage`, made where there is none, with exact search as its first trial."""
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    study = optuna.create_study(storage=journal, study_name=name, direction="maximize", load_if_exists=True)
    study.enqueue_trial(dict.fromkeys(names(), 0.0), skip_if_exists=True)
    return study


def names() -> list[str]:
    """Names of the searched logarithms."""
    return [f"growth {i}" for i in range(KNOTS - 1)]


def search(study: Any, laboratory: Laboratory, trials: int) -> None:
    """Ask for a trial, sample it, tell the result, so many times."""
    for _ in range(trials):
        trial = study.ask()
        policy = laboratory.policy([trial.suggest_float(name, -RANGE, RANGE) for name in names()])
        decibels = laboratory.decibels(policy, laboratory.others)
        study.tell(trial, decibels)
        actions = policy.points[policy.chosen].actions()
        print(f"trial {trial.number:>3}  cost {policy.cost:.2f}  {decibels:5.1f} dB  {actions}", flush=True)


def conclude(study: Any, laboratory: Laboratory) -> None:
    """Save the best policy that any process has sampled, and print its closeness on report prompts."""
    from fastercache_pack.fastercache_core.calibration.policy_file import dumps

    report = laboratory.bed.prompts("report")[: laboratory.task.pictures]
    start, best = (
        laboratory.policy([parameters[name] for name in names()])
        for parameters in (dict.fromkeys(names(), 0.0), study.best_params)
    )
    path = OUTPUT / f"{laboratory.task.name.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(best))
    print(
        f"best of {len(study.trials)} trials: {study.best_value:.1f} dB on tuning prompts, "
        f"{laboratory.decibels(best, report):.1f} on report prompts; "
        f"exact search there: {laboratory.decibels(start, report):.1f}\n{path}"
    )


def main() -> None:
    """Take part in a study."""
    parser = argparse.ArgumentParser(prog="dev.py bench search")
    parser.add_argument("--bed", choices=list(BEDS), default="mmdit", help="the model")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps")
    parser.add_argument("--cfg", type=float, default=4.5, help="guidance scale")
    parser.add_argument("--budget", type=float, default=0.5, help="part of the passes that may be run")
    parser.add_argument("--pictures", type=int, default=8, help="prompts to fit on, and as many to compare on")
    parser.add_argument("--trials", type=int, default=40, help="trials of this process")
    parser.add_argument("--storage", type=Path, default=OUTPUT / "search.journal", help="the file that all share")
    chosen = parser.parse_args()
    try:
        import optuna
    except ImportError:
        sys.exit("This search runs on Optuna, which is not installed: .venv/bin/pip install optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen.storage.parent.mkdir(parents=True, exist_ok=True)
    task = Task(chosen.bed, chosen.steps, chosen.cfg, chosen.budget, chosen.pictures)
    study, laboratory = shared_study(optuna, chosen.storage, task.name), Laboratory(task)
    search(study, laboratory, chosen.trials)
    conclude(study, laboratory)


if __name__ == "__main__":
    with plain_errors():
        main()
