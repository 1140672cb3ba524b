"""Compares several ways to sample the same prompts: cost, time, and closeness to full sampling."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.tools.pictures import closeness
from benchmarks.tools.sampling import SEED, Bench, Result, Run
from testbed.server import ROOT, Host

BATCH = 8  # pictures sampled together


def compare(name: str, runs: Sequence[Run]) -> None:
    """Sample the report prompts with every run, print the table and write output/NAME/summary.json."""
    prompts = json.loads((ROOT / "testbed" / "prompts.json").read_text())["report"]
    with Host(threads=2) as host:
        summary = summarise(sample_all(Bench(host), runs, prompts))
    output = ROOT / "output" / name
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    print(table(summary))


def sample_all(bench: Bench, runs: Sequence[Run], prompts: Sequence[str]) -> dict[str, list[Result]]:
    """{run name: results, one a batch}; the first run is the full one.

    All runs take their turn on each batch, each time beginning with another one, so that a machine
    that gets slower or faster meanwhile, or is slow at first, favours none of them.
    """
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    print(f"Sampling {len(prompts)} prompts in {len(runs)} ways")
    bench.sample(runs[0], batches[0], seed=0)  # a warm-up: loads the model
    results: dict[str, list[Result]] = {run.name: [] for run in runs}
    with tqdm(total=len(runs) * len(batches), unit="run", disable=None) as bar:
        for i, batch in enumerate(batches):
            for name, result in sample_batch(bench, rotated(runs, i / len(batches)), batch, SEED + i, bar).items():
                results[name].append(result)
    return results


def rotated(runs: Sequence[Run], fraction: float) -> list[Run]:
    """The same runs, beginning further on."""
    first = int(len(runs) * fraction)
    return [*runs[first:], *runs[:first]]


def sample_batch(
    bench: Bench, runs: Sequence[Run], prompts: Sequence[str], seed: int, bar: "tqdm[Any]"
) -> dict[str, Result]:
    """{run name: result} for one batch: first the runs that are controlled, then their controls."""
    results = dict(sample_each(bench, [run for run in runs if not run.steps_of], prompts, seed, bar))
    controls = [
        replace(run, steps=equal_steps(results[run.steps_of].rows, len(prompts))) for run in runs if run.steps_of
    ]
    return results | dict(sample_each(bench, controls, prompts, seed, bar))


def equal_steps(rows: int, pictures: int) -> int:
    """The fewest plain steps, each 2 rows a picture, that are not cheaper than `rows`."""
    return math.ceil(rows / (2 * pictures))


def plain_steps(cost: float, steps: int) -> int:
    """The fewest plain steps that are not cheaper than `cost`, a share of so many steps."""
    return math.ceil(cost * steps - 1e-3)


def sample_each(
    bench: Bench, runs: Sequence[Run], prompts: Sequence[str], seed: int, bar: "tqdm[Any]"
) -> Iterator[tuple[str, Result]]:
    """Sample one batch with every run, giving (name, result); equal controls are sampled once."""
    done: dict[Any, Result] = {}
    for run in runs:
        key = run.name if run.nodes else (run.seed, run.steps, run.cfg, run.sampler, run.scheduler)
        if key not in done:
            bar.set_description(run.name)
            done[key] = bench.sample(
                run, prompts, seed, lambda value, most: bar.set_postfix_str(f"step {value}/{most}")
            )
        bar.update()
        yield run.name, done[key]


def summarise(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """{"runs": [...]}: rows, cost, time and closeness of every run, against the first one."""
    full = next(iter(results.values()))
    return {"runs": [entry(name, mine, full) for name, mine in results.items()]}


def entry(name: str, mine: Sequence[Result], full: Sequence[Result]) -> dict[str, Any]:
    """One run of the summary. psnr is null where the pictures equal the full run's to the bit."""
    psnr, ssim = (np.concatenate(x) for x in zip(*(closeness(a.pictures, b.pictures) for a, b in zip(mine, full))))
    same = bool(np.isinf(psnr).any())
    rows = sum(result.rows for result in mine)
    return {
        "name": name,
        "rows": rows,
        "cost": rows / sum(result.rows for result in full),
        "seconds": sum(result.seconds for result in mine),
        "time_ratio": statistics.median(a.seconds / b.seconds for a, b in zip(mine, full)),
        "psnr": None if same else float(psnr.mean()),
        "psnr_std": None if same else float(psnr.std()),
        "ssim": float(ssim.mean()),
        "report": report(mine, same and mine is not full),
    }


def report(results: Sequence[Result], same: bool) -> dict[str, Any] | None:
    """The pack's report on the first batch; for others a note when the pictures are the full run's own."""
    if results[0].report:
        return results[0].report
    return {"notes": ["does nothing on this model"]} if same else None


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a person."""
    lines = ["run                      rows   cost  seconds   time   PSNR dB        SSIM"]
    for row in summary["runs"]:
        psnr = "   equal     " if row["psnr"] is None else f"{row['psnr']:5.1f} +- {row['psnr_std']:<4.1f}"
        notes = (row["report"] or {}).get("notes", [])
        lines.append(
            f"{row['name']:<22} {row['rows']:>6}  {row['cost']:5.2f}  {row['seconds']:7.1f}  "
            f"{row['time_ratio']:5.2f}   {psnr}  {row['ssim']:6.4f}  {'; '.join(notes)}".rstrip()
        )
    return "\n".join(lines)
