"""The tables of the FasterCache and FRDiff papers on our models, and whether their findings hold here.

One run for every row of TABLES, all at `--steps` Euler steps; beside each the plain steps at its cost, from which the
gain is interpolated. Cost is counted FLOPs on one prompt, closeness is PSNR to full sampling, mean of `--pictures`
prompts. Below the tables every FINDING of the papers: whether its direction holds here, with the figures. `--bed`
chooses the model. Writes output/papers/BED.json and prints the tables; docs/papers.md is made of them.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.tools.comparison import BATCH, sample_each
from benchmarks.tools.decibels import mean_and_std, psnr
from benchmarks.tools.sampling import SEED, Bench, Result, Run
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors

OUTPUT = ROOT / "output" / "papers"
START = 1 / 3  # where the paper begins to skip
PLAIN = (0.3, 0.37, 0.43, 0.5, 0.57, 0.63, 0.7, 0.77, 0.83, 0.9, 0.97)  # shares of the steps, for the controls

Nodes = tuple[tuple[str, dict[str, Any]], ...]
Figures = Mapping[str, Mapping[str, Any]]


def reuse(weight: str, every: int = 2, w: float = 0.0, depth: str = "attention") -> Nodes:
    """Feature reuse alone, from a third of sampling to its end."""
    part = {"reuse_start_percent": START, "reuse_end_percent": 1.0, "reuse_interval": every, "reuse_weight": w}
    return (("FasterCache", {"preset": "none", "feature_reuse": weight, "reuse_depth": depth, **part}),)


def cfg_cache(every: int = 5, weights: str = "paper", **inputs: Any) -> Nodes:
    """CFG-Cache alone, as in the paper but for what is said."""
    settings = {"interval": every, "weights": weights, "forecast": "hold", "tolerance": 0.0, "start_percent": START}
    return (("FasterCacheCFG", {**settings, **inputs}),)


def published(row: str) -> Nodes:
    """A row of the published settings."""
    return (("FasterCache", {"preset": "paper", "published": row}),)


def frdiff(**inputs: Any) -> Nodes:
    """FRDiff as published but for what is said, its last step as released."""
    return (("FasterCacheFRDiff", {"skip_last": True, **inputs}),)


TABLES: dict[str, dict[str, Nodes]] = {
    "FasterCache, table 2: its parts": {
        "vanilla reuse": reuse("hold"),
        "dynamic reuse": reuse("ramp"),
        "CFG-Cache": cfg_cache(),
        "both": (*reuse("ramp"), *cfg_cache()),
    },
    "FasterCache: enhancement of CFG-Cache": {
        "neither band": cfg_cache(weights="none"),
        "low band": cfg_cache(alpha_high=0.0),
        "high band": cfg_cache(alpha_low=0.0),
        "both bands": cfg_cache(),
        "released, CogVideoX (1.1)": cfg_cache(weights="released"),
        "released, Open-Sora (1.15)": cfg_cache(weights="released", released="Open-Sora"),
    },
    "FasterCache: interval of CFG-Cache": {f"CFG 1 in {n}": cfg_cache(n) for n in (1, 3, 5, 7, 9)},
    "FasterCache: interval of dynamic reuse": {f"reuse 1 in {n}": reuse("ramp", n) for n in (2, 3, 4, 5)},
    "FasterCache: w of dynamic reuse": {
        "w 0": reuse("hold"),
        "w 0.3": reuse("constant", w=0.3),
        "w 0.5": reuse("constant"),
        "w from 0 to 1": reuse("ramp"),
    },
    "FasterCache, table 1: beside others": {
        **{name: published(name) for name in ("CogVideoX", "Open-Sora", "Latte", "Mochi", "Vchitect", "diffusers")},
        "PAB CogVideoX": published("PAB CogVideoX"),
        "PAB Open-Sora-Plan": published("PAB Open-Sora-Plan"),
        "Delta-DiT": published("Delta-DiT"),
    },
    "FRDiff: reuse, reduced NFE, mixing": {
        f"{name} M={every}": frdiff(interval=every, score_mixing=mixing)
        for every in (2, 3)
        for name, mixing in (("reuse", "features"), ("reduced NFE", "scores"), ("mixing", "paper"))
    },
    "FRDiff: tau and bias": {
        **{f"tau {tau}": frdiff(slope=float(tau)) for tau in (10, 30, 1000)},
        **{f"bias {bias}": frdiff(bias=bias) for bias in (0.3, 0.5, 0.7)},
    },
}


def higher(figures: Figures, better: str, worse: str, what: str = "psnr") -> bool:
    """True where a figure of one run is above that of another."""
    return float(figures[better][what]) > float(figures[worse][what])


def falls(figures: Figures, *names: str) -> bool:
    """True where every run is farther from full sampling than the one before."""
    return all(higher(figures, a, b) for a, b in pairwise(names))


# A finding of a paper: (what it says, the runs that show it, whether it holds).
FINDINGS: list[tuple[str, tuple[str, ...], Callable[..., bool]]] = [
    ("dynamic reuse is closer than vanilla reuse", ("dynamic reuse", "vanilla reuse"), falls),
    ("a ramp of w is closer than a fixed 0.5", ("w from 0 to 1", "w 0.5"), falls),
    ("the longer the interval of reuse, the farther", tuple(f"reuse 1 in {n}" for n in (2, 3, 4, 5)), falls),
    ("the longer the interval of CFG-Cache, the farther", tuple(f"CFG 1 in {n}" for n in (1, 3, 5, 7, 9)), falls),
    ("enhancing both bands is closer than neither", ("both bands", "neither band"), falls),
    ("enhancing the low band is closer than neither", ("low band", "neither band"), falls),
    ("the low band matters more than the high one", ("low band", "high band"), falls),
    ("FasterCache is closer than PAB", ("CogVideoX", "PAB CogVideoX"), falls),
    ("PAB is closer than Delta-DiT", ("PAB CogVideoX", "Delta-DiT"), falls),
    ("mixing is closer than reduced NFE, M = 2", ("mixing M=2", "reduced NFE M=2"), falls),
    ("mixing is closer than reduced NFE, M = 3", ("mixing M=3", "reduced NFE M=3"), falls),
    ("mixing costs less than reuse, M = 2", ("reuse M=2", "mixing M=2"), lambda f, a, b: higher(f, a, b, "cost")),
    ("mixing gains more than reuse at its cost, M = 2", ("mixing M=2", "reuse M=2"),
     lambda f, a, b: higher(f, a, b, "gain")),
    ("mixing gains more than reduced NFE at its cost, M = 2", ("mixing M=2", "reduced NFE M=2"),
     lambda f, a, b: higher(f, a, b, "gain")),
]  # fmt: skip


def measure(bench: Bench, batches: Sequence[Sequence[str]], steps: int) -> dict[str, dict[str, Any]]:
    """{run name: its figures}."""
    runs = {name: Run(name, nodes, steps=steps) for table in TABLES.values() for name, nodes in table.items()}
    plain = [Run(f"{count} steps", steps=count) for count in sorted({round(share * steps) for share in PLAIN})]
    results: dict[str, list[Result]] = {}
    turn = [Run("full", steps=steps), *runs.values(), *plain]
    with tqdm(total=len(turn) * len(batches), unit="run", disable=None) as bar:
        for i, batch in enumerate(batches):
            for name, result in sample_each(bench, turn, batch, SEED + i, bar):
                results.setdefault(name, []).append(result)
    whole = bench.count_flops(Run("full", steps=steps), batches[0][:1])
    points = {run.steps / steps: np.minimum(psnr(results, run.name), 100.0) for run in plain} | {1.0: 100.0}
    figures = {}
    for name, run in runs.items():
        cost = bench.count_flops(run, batches[0][:1]) / whole
        ours = np.minimum(psnr(results, name), 100.0)
        report = results[name][0].report or {}
        figures[name] = {
            "cost": cost,
            **mean_and_std("psnr", ours),
            **mean_and_std("gain", ours - at_cost(points, cost)),
            "evaluations": report["totals"]["evaluations"],
            "notes": report["notes"],
        }
    return figures


def at_cost(points: Mapping[float, Any], cost: float) -> Any:
    """PSNR of plain steps at a cost, picture by picture, between the two runs around it. points: {cost: PSNR}."""
    costs = [c for c in points if c < 1.0]
    columns = np.stack([points[c] for c in costs])
    return np.array([np.interp(cost, costs, column) for column in columns.T])


def tables(figures: Figures) -> str:
    """Every table and finding, as Markdown."""
    lines = []
    for title, rows in TABLES.items():
        lines += ["", f"**{title}**", "", "| run | cost | PSNR dB | gain over fewer steps |", "|---|---:|---:|---:|"]
        lines += [row(name, figures[name]) for name in rows]
    lines += ["", "| finding | holds here | PSNR dB (gain at equal cost) |", "|---|---|---|"]
    for says, names, holds in FINDINGS:
        shown = ", ".join(f"{name} {figures[name]['psnr']:.1f} ({figures[name]['gain']:+.1f})" for name in names)
        lines.append(f"| {says} | {'yes' if holds(figures, *names) else 'no'} | {shown} |")
    return "\n".join(lines)


def row(name: str, entry: Mapping[str, Any]) -> str:
    """One run for a person."""
    values = [f"{entry[what]:.1f} +- {entry[f'{what}_std']:.1f}" for what in ("psnr", "gain")]
    return f"| {name} | {entry['cost']:.2f} | {values[0]} | {values[1]} |"


def main() -> None:
    """Measure one bed."""
    parser = argparse.ArgumentParser(prog="dev.py bench papers")
    parser.add_argument("--bed", choices=list(BEDS), default="mmdit", help="the model")
    parser.add_argument("--steps", type=int, default=30, help="number of steps of full sampling")
    parser.add_argument("--pictures", type=int, default=8, help="at most so many prompts")
    options = parser.parse_args()
    prompts = BEDS[options.bed].prompts("report")[: options.pictures]
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    with Host(threads=2) as host:
        figures = measure(Bench(host, options.bed), batches, options.steps)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / f"{options.bed}.json").write_text(json.dumps({"steps": options.steps, "runs": figures}, indent=1))
    print(f"\n{options.bed}, {options.steps} steps, {len(prompts)} pictures\n{tables(figures)}")


if __name__ == "__main__":
    with plain_errors():
        main()
