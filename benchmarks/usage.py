"""What the presets of FasterCache leave of the work in the settings that most people run, and how close they come.

    python dev.py bench usage                                   # some minutes
    python dev.py bench usage --pictures 8 --settings 'euler 8' 'euler 4' --json output/usage.json
    python dev.py bench usage --prompts tuning --beds wan --presets fast --no-host-caches

The settings, their weights and the beds that stand for their models: benchmarks/tools/usage_settings.py. Pictures are
sampled one at a time. Cost is network rows over those of full sampling with the same model, seed, sampler and steps;
PSNR is to that picture. Fewer steps: as many plain steps as cost the same, the error interpolated in 1 / steps. Where
a sampler adds noise, fewer steps give another picture. EasyCache and LazyCache run with the threshold that brings
their cost nearest to ours, of a ladder of thresholds. Pictures in which nothing was skipped count for the cost alone.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.tools.frontier import at_steps, psnr_of, standard_error
from benchmarks.tools.jobs import Job, Painted, Painter, Patch, targets
from benchmarks.tools.sampling import PRESETS, SEED
from benchmarks.tools.usage_settings import SETTINGS, Setting, beds_of
from testbed.beds import BEDS
from testbed.server import plain_errors

HOST_CACHES = ("EasyCache", "LazyCache")
THRESHOLDS = np.geomspace(0.01, 3.0, 16).round(3).tolist()  # rising: the cost falls
OTHER_SEED = 1000  # added to the seed
COLUMNS = ("setting", "usage", "bed", "cost", "PSNR dB", "over fewer steps", "met", "least", *HOST_CACHES, "other seed")

Point = tuple[float, float | None]  # cost and PSNR in dB, None for an equal picture


@dataclass(frozen=True)
class Record:
    """One picture under one preset. PSNR in dB, null where the picture is equal; `fewer` and the host's caches
    (cost, PSNR) are null where the preset skipped nothing, `met` where it has no target.

    actions: one letter an evaluation of every stage, see jobs.Painted.
    """

    setting: str
    weight: float
    bed: str
    preset: str
    prompt: str
    seed: int
    cost: float
    psnr: float | None
    fewer: float | None
    met: bool | None
    actions: str
    target: float | None
    other_seed: float | None
    EasyCache: Point | None = None
    LazyCache: Point | None = None

    @property
    def gain(self) -> float | None:
        """dB above fewer steps at equal cost, None where one of them is equal to full sampling."""
        return None if self.psnr is None or self.fewer is None else self.psnr - self.fewer


class Picture:
    """A job with all that its presets are compared to, each sampled once."""

    def __init__(self, painter: Painter, job: Job) -> None:
        self.painter, self.job = painter, job
        self.plain_error = cache(self._plain_error)
        self.host_cache = cache(self._host_cache)

    @cached_property
    def full(self) -> Painted:
        """Full sampling."""
        return self.painter.paint(self.job)

    @cached_property
    def other_seed(self) -> float | None:
        """PSNR of full sampling with another seed."""
        job = self.job
        return psnr_of(self.error(self.painter.paint(Job(job.setting, job.prompt, job.seed + OTHER_SEED))))

    def error(self, painted: Painted) -> float:
        """Root mean square distance to full sampling."""
        return math.sqrt((painted.picture.double() - self.full.picture.double()).square().mean().item())

    def _plain_error(self, steps: int) -> float:
        if steps == self.job.setting.steps:
            return 0.0
        return self.error(self.painter.paint(self.job, steps=steps))

    def _host_cache(self, kind: str, threshold: float) -> Point:
        return self.point(self.painter.paint(self.job, Patch(kind, threshold)))

    def point(self, painted: Painted) -> Point:
        """Cost and PSNR."""
        return painted.rows / self.full.rows, psnr_of(self.error(painted))

    def fewer(self, cost: float) -> float | None:
        """PSNR of plain steps at a cost below 1; there is a step for each stage at least."""
        return psnr_of(at_steps(self.plain_error, max(cost * self.job.setting.steps, self.job.setting.stages)))

    def record(self, preset: str, target: float | None, host_caches: bool) -> Record:
        """The picture under a preset, beside its controls where that skipped anything."""
        painted, job = self.painter.paint(self.job, Patch("FasterCache", preset)), self.job
        cost, psnr = self.point(painted)
        skipped = psnr is not None and cost < 1
        beside = HOST_CACHES if skipped and host_caches else ()
        return Record(
            setting=job.setting.name,
            weight=job.setting.weight,
            bed=self.painter.name,
            preset=preset,
            prompt=job.prompt,
            seed=job.seed,
            cost=cost,
            psnr=psnr,
            fewer=self.fewer(cost) if skipped else None,
            met=None if target is None else psnr is None or psnr >= target,
            actions=painted.actions,
            target=target,
            other_seed=self.other_seed,
            **{kind: nearest(lambda threshold, kind=kind: self.host_cache(kind, threshold), cost) for kind in beside},
        )


def nearest(sampled: Callable[[float], Point], cost: float) -> Point:
    """Of a cache that gets cheaper from threshold to threshold, the point nearest to a cost, found by bisection."""
    low, high = 0, len(THRESHOLDS) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sampled(THRESHOLDS[middle])[0] <= cost else (middle + 1, high)
    return min((sampled(t) for t in THRESHOLDS[max(low - 1, 0) : low + 1]), key=lambda point: abs(point[0] - cost))


def work_left(records: Iterable[Record]) -> tuple[float, float]:
    """(mean cost weighted by usage, sum of the weights) of one preset; a setting's beds count alike."""
    beds = grouped(records, lambda r: (r.setting, r.weight, r.bed))
    costs = grouped(beds.items(), lambda item: item[0][:2])
    weights = [weight for _, weight in costs]
    means = [np.mean([mean_cost(group) for _, group in cells]) for cells in costs.values()]
    return float(np.average(means, weights=weights)), float(sum(weights))


def grouped(values: Iterable, key: Callable) -> dict:
    """{key: values}, in the order of their first ones."""
    groups: dict = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def mean_cost(records: Sequence[Record]) -> float:
    """Mean cost of pictures."""
    return float(np.mean([record.cost for record in records]))


def table(records: Sequence[Record]) -> str:
    """One preset as Markdown: a row for each setting and bed."""
    rules = "|---|---:|---|" + "---:|" * (len(COLUMNS) - 3)
    cells = grouped(records, lambda r: (r.setting, r.bed)).values()
    head, *rows = ("| " + " | ".join(row) + " |" for row in (COLUMNS, *map(row_of, cells)))
    return "\n".join([head, rules, *rows])


def row_of(records: Sequence[Record]) -> list[str]:
    """The cells of one setting and bed; PSNR, `met` and `least` are those of pictures in which anything was skipped."""
    first, touched = records[0], [record for record in records if record.psnr is not None]
    psnr, met = [record.psnr for record in touched], [record.met for record in touched if record.met is not None]
    return [
        first.setting,
        f"{first.weight:g}%",
        first.bed,
        f"{mean_cost(records):.2f}",
        with_error(psnr) or "nothing skipped",
        with_error([record.gain for record in touched if record.gain is not None], "+"),
        f"{sum(met)} of {len(met)}" if met else "",
        f"{min(psnr):.1f}" if psnr else "",
        *(host_cell([getattr(record, kind) for record in touched]) for kind in HOST_CACHES),
        with_error([record.other_seed for record in records if record.other_seed is not None]).split(" ")[0],
    ]


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Mean +- its standard error, "" for no values."""
    return f"{np.mean(values):{sign}.1f} +- {standard_error(values):.1f}" if values else ""


def host_cell(points: Sequence[Point | None]) -> str:
    """Mean cost and PSNR of a cache of the host, of the pictures that it changed."""
    changed = [point for point in points if point and point[1] is not None]
    if not changed:
        return "does nothing" if any(points) else ""
    cost, psnr = np.mean(changed, axis=0)
    return f"{cost:.2f}: {psnr:.1f}"


def records_of(options: argparse.Namespace) -> list[Record]:
    """Every picture that the command line asks for, under every preset."""
    painter_of, records = cache(Painter), []
    chosen = [setting for setting in SETTINGS if setting.name in options.settings]
    cells = [(setting, bed) for setting in chosen for bed in beds_of(setting, options.beds)]
    with tqdm(total=len(cells) * options.pictures, unit="picture", disable=None) as bar:
        for setting, bed in cells:
            bar.set_description(f"{setting.name}, {bed}")
            for picture in pictures(painter_of(bed), setting, options):
                records += [picture.record(p, targets().get(p), options.host_caches) for p in options.presets]
                bar.update()
    return records


def pictures(painter: Painter, setting: Setting, options: argparse.Namespace) -> list[Picture]:
    """The first prompts of the chosen part, each with a seed of its own."""
    prompts = itertools.islice(painter.bed.prompts(options.prompts), options.pictures)
    return [Picture(painter, Job(setting, prompt, SEED + number)) for number, prompt in enumerate(prompts)]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="dev.py bench usage", description="The settings that most people run.")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=[], metavar="BED", help="only these models")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS[:3], metavar="PRESET")
    parser.add_argument("--prompts", choices=("tuning", "report"), default="report")
    parser.add_argument("--pictures", type=int, default=4, help="for each setting and bed, at most so many prompts")
    parser.add_argument("--no-host-caches", dest="host_caches", action="store_false", help="no EasyCache, no LazyCache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="one record for each picture, for fits")
    return parser.parse_args(words)


def show(records: Sequence[Record]) -> None:
    """A table for each preset, then one number for each."""
    presets = grouped(records, lambda record: record.preset)
    for preset, mine in presets.items():
        print(f"\n**{preset}**\n\n{table(mine)}")
    print("\n| work left, weighted by usage | " + " | ".join(presets) + " |\n|---|" + "---:|" * len(presets))
    left = [work_left(mine) for mine in presets.values()]
    print(f"| settings of {left[0][1]:g}% | " + " | ".join(f"{cost:.3f}" for cost, _ in left) + " |")


def main() -> None:
    """Sample, write the records and show the tables."""
    options = parse()
    records = records_of(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(record) for record in records], indent=1))
    if records:
        show(records)


if __name__ == "__main__":
    with plain_errors():
        main()
