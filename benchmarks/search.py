"""Searches a policy by trying policies, in as many processes and on as many machines as you like, with Optuna.

    pip install optuna
    python dev.py bench search --bed mmdit --budget 0.5 --trials 40 --storage search.journal

What a recorded run cannot tell is how much an error grows until the end, and that is all that is searched:
a few numbers over the run, by which errors there count more or less. For each set of them exact search gives
the best policy, which is then fitted on tuning prompts and sampled on other ones. The first trial is the
policy of exact search itself. Every process has a host of its own and asks the study for a trial, tells what
came out, and asks again; they only share the journal file (on another machine: over a network folder).
Writes output/search/NAME.json, for FasterCache Policy Load, and prints what it is worth on report prompts.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.tools.recording import load_model
from benchmarks.tools.sampling import SEED
from testbed.beds import BEDS
from testbed.pack import load_pack
from testbed.server import ROOT, plain_errors

KNOTS = 6                   # numbers that say how much an error counts, evenly over the run; the last is one
RANGE = 2.0                 # each from exp(-RANGE) to exp(RANGE)
OUTPUT = ROOT / "output" / "search"


@dataclass(frozen=True)
class Task:
    """What is searched. pictures: prompts to learn from, and as many others to judge by."""
    bed: str
    steps: int
    cfg: float
    budget: float
    pictures: int

    @property
    def name(self):
        """Of the study, and of the policy's file."""
        return f"{self.bed} {self.steps} steps cfg {self.cfg:g} at {self.budget:g}"


class Laboratory:
    """Finds and samples policies on the model of a Task."""

    def __init__(self, task):
        self.task, self.bed, self.model = task, BEDS[task.bed], load_model(task.bed)
        import utils.extra_config  # noqa: F401  (ComfyUI's nodes.py later hides its own `utils` package)
        load_pack()
        from fastercache_pack.nodes.host.calibrate import recorded
        tuning = self.bed.prompts("tuning")
        learnt, self.others = tuning[:task.pictures], tuning[task.pictures:2 * task.pictures]
        self.sampling = self._sampling(learnt)
        self.reference, self.losses = recorded(self.model, self.sampling)
        self.effects, self.full = self.losses.effects, {}

    def policy(self, numbers):
        """The policy that exact search finds where errors count as `numbers` say (KNOTS - 1 logarithms)."""
        from fastercache_pack.fastercache_core.calibration import find_points
        from fastercache_pack.nodes.host.calibrate import chosen
        self.losses.effects = list(np.array(self.effects) * growth(numbers, len(self.effects)))
        self.losses.known.clear()  # what it has worked out with other numbers
        points = find_points(self.reference, self.losses)
        return chosen(self.model, self.sampling, self.reference, points, self.task.budget)

    def decibels(self, policy, prompts):
        """Mean PSNR to full sampling of `prompts` under a policy."""
        from fastercache_pack.fastercache_core.metrics import psnr
        from fastercache_pack.fastercache_core.storage import StorageSettings
        from fastercache_pack.nodes.frdiff import policy_settings
        from fastercache_pack.nodes.host.attach import attach
        prompts = tuple(prompts)
        if prompts not in self.full:
            self.full[prompts] = self._pictures(self.model, prompts)
        cached = attach(self.model, policy_settings(policy, StorageSettings()))
        return float(psnr(self._pictures(cached, prompts), self.full[prompts]).mean())

    def _pictures(self, model, prompts):
        import comfy.sample
        told, seed = self._sampling(prompts), SEED + 1
        samples = comfy.sample.sample(model, comfy.sample.prepare_noise(told.latent, seed), told.steps, told.cfg,
                                      told.sampler, told.scheduler, told.positive, told.negative, told.latent,
                                      seed=seed, disable_pbar=True)
        return self.bed.decode(self.model, samples)

    def _sampling(self, prompts):
        from fastercache_pack.nodes.host.calibrate import Sampling
        return Sampling(self.bed.conditioning(list(prompts)), self.bed.conditioning([""]),
                        self.bed.empty(len(prompts)), SEED, self.task.steps, self.task.cfg, "euler",
                        self.bed.scheduler)


def growth(numbers, count):
    """By how much errors of `count` evaluations count: through the KNOTS, in logarithms; 1 at the last."""
    places = np.linspace(0, 1, count)
    return np.exp(np.interp(places, np.linspace(0, 1, KNOTS), [*numbers, 0.0]))


def shared_study(optuna, storage, name):
    """The study in the journal file `storage`, made where there is none, with exact search as its first trial."""
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    study = optuna.create_study(storage=journal, study_name=name, direction="maximize", load_if_exists=True)
    study.enqueue_trial(dict.fromkeys(names(), 0.0), skip_if_exists=True)
    return study


def names():
    """Names of the searched numbers."""
    return [f"growth {i}" for i in range(KNOTS - 1)]


def search(study, laboratory, trials):
    """Ask for a trial, sample it, tell the result, so many times."""
    for _ in range(trials):
        trial = study.ask()
        policy = laboratory.policy([trial.suggest_float(name, -RANGE, RANGE) for name in names()])
        found = laboratory.decibels(policy, laboratory.others)
        study.tell(trial, found)
        print(f"trial {trial.number:>3}  cost {policy.cost:.2f}  {found:5.1f} dB  "
              f"{policy.points[policy.chosen].actions()}", flush=True)


def conclude(study, laboratory):
    """Save the best policy that any process found, and say what it is worth on report prompts."""
    from fastercache_pack.fastercache_core.policy import dumps
    report = laboratory.bed.prompts("report")[:laboratory.task.pictures]
    start, best = (laboratory.policy([numbers[name] for name in names()])
                   for numbers in (dict.fromkeys(names(), 0.0), study.best_params))
    path = OUTPUT / f"{laboratory.task.name.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(best))
    print(f"best of {len(study.trials)} trials: {study.best_value:.1f} dB on tuning prompts, "
          f"{laboratory.decibels(best, report):.1f} on report prompts; "
          f"exact search there: {laboratory.decibels(start, report):.1f}\n{path}")


def main():
    """Take part in a study."""
    parser = argparse.ArgumentParser(prog="dev.py bench search")
    parser.add_argument("--bed", choices=list(BEDS), default="mmdit", help="the model")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps")
    parser.add_argument("--cfg", type=float, default=4.5, help="guidance scale")
    parser.add_argument("--budget", type=float, default=0.5, help="part of the passes that may be run")
    parser.add_argument("--pictures", type=int, default=8, help="prompts to learn from, and as many to judge by")
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
