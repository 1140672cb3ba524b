"""Whether pictures come as close as asked for on models that nothing was fitted on.

    python dev.py bench promise                                         # about an hour on one core
    python dev.py bench promise --beds wan --prompts report --json output/wan.json
    python dev.py bench promise --tables output/*.json                  # of records that were written before

Every picture is sampled in full and, for every wish, with as many steps predicted as that allows. What a run spent of
its error budget and how close its picture came give the constant of a law (fastercache_core/law.py). The law is fitted
to the tuning prompts of all models but one and its relatives, and judged by the report prompts of that one. A law only
shifts wishes: a run that was asked for t dB under the law in use is the run that a law which is d dB bolder makes of a
wish of t + d.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.tools.frontier import psnr_of
from benchmarks.tools.jobs import Job, Painter, report_of, with_node
from benchmarks.tools.sampling import SEED
from benchmarks.tools.usage_settings import FIRST_LIST, Setting
from fastercache_core.law import Law, constant
from fastercache_core.solvers import EULER, MULTISTEP
from testbed.beds import BEDS
from testbed.server import plain_errors

WISHES = (54.0, 50.0, 46.0, 42.0, 38.0, 34.0, 30.0)
# Models that share weights: what is left out of a fit together.
RELATIVES = {
    "mmdit": "mmdit",
    "mmdit_turbo8": "mmdit",
    "wan": "wan",
    "wan_guided": "wan",
    "unet": "unet",
    "photos": "photos",
}
CLOSE = 60.0  # dB; pictures that are closer say nothing of the wishes here, and do not count in a fit
LISTS = {"list": FIRST_LIST}


@dataclass(frozen=True)
class Sampling:
    """How to sample. schedule: "" for the bed's own scheduler, a scheduler's name, or one of LISTS."""

    sampler: str
    steps: int
    cfg: float = 1.0
    schedule: str = ""

    @property
    def kind(self) -> str:
        """The law that it falls under."""
        return "euler" if self.sampler == "euler" else "second order"

    @property
    def steps_class(self) -> str:
        """How it is told in the tables."""
        return f"{self.schedule or self.sampler} {self.steps}" + (f", cfg {self.cfg:g}" if self.cfg != 1 else "")


SAMPLINGS = (
    *(Sampling("euler", steps) for steps in (8, 12, 20, 30)),
    *(Sampling("euler", steps, 4.5) for steps in (20, 30)),
    *(Sampling("euler", steps, 1.0, "linear_quadratic") for steps in (12, 20)),
    Sampling("euler", 8, 1.0, "list"),
    *(Sampling("res_multistep", steps) for steps in (8, 12, 20, 30)),
    Sampling("res_multistep", 20, 4.5),
    Sampling("dpmpp_2m", 20),
    Sampling("dpmpp_2m", 30, 4.5),
)


@dataclass(frozen=True)
class Record:
    """One picture under one wish (dB). spent: of the error budget, None where nothing was skipped; psnr: dB to full
    sampling, None for an equal picture."""

    bed: str
    prompts: str
    sampling: Sampling
    wish: float
    cost: float
    psnr: float | None
    spent: float | None

    @property
    def family(self) -> str:
        """The model with its relatives."""
        return RELATIVES[self.bed]

    @property
    def steps_class(self) -> str:
        """How its sampling is told in the tables."""
        return self.sampling.steps_class

    @property
    def constant(self) -> float | None:
        """Of the law, in dB; None where it shows nothing."""
        if self.psnr is None or not self.spent or self.psnr > CLOSE:
            return None
        return constant(self.psnr, self.spent)


class Sampler:
    """Samples one bed."""

    def __init__(self, bed: str) -> None:
        self.painter = Painter(bed)

    def records(self, prompts: str, pictures: int, wishes: Sequence[float]) -> Iterator[Record]:
        """Of the first pictures of a part of the prompts, under every sampling that serves the model."""
        chosen = list(itertools.islice(self.painter.bed.prompts(prompts), pictures))
        for sampling, (number, prompt) in itertools.product(self._samplings(), enumerate(chosen)):
            job = Job(Setting("", 0, sampling.sampler, sampling.steps, sampling.cfg, ()), prompt, SEED + number)
            full, _ = self._paint(job, sampling, None)
            for wish in wishes:
                picture, report = self._paint(job, sampling, wish)
                error = (picture - full).square().mean().item()
                yield Record(
                    self.painter.name,
                    prompts,
                    sampling,
                    wish,
                    report["totals"]["cost"],
                    psnr_of(math.sqrt(error)),
                    report["run"].get("spent"),
                )

    def _samplings(self) -> Iterator[Sampling]:
        from comfy.model_sampling import CONST

        flow, guided = (
            isinstance(self.painter.model.get_model_object("model_sampling"), CONST),
            self.painter.bed.cfg > 1,
        )
        lists = [sampling for sampling in SAMPLINGS if flow or sampling.schedule not in LISTS]
        return (sampling for sampling in lists if guided or sampling.cfg == 1)

    def _paint(self, job: Job, sampling: Sampling, wish: float | None) -> tuple[torch.Tensor, Any]:
        """The picture, and the report of a run under a wish."""
        painter = self.painter
        model = painter.model if wish is None else with_node(painter.model, closeness=wish)
        latent = painter.sample(model, job, 0, self._sigmas(sampling), painter.bed.empty(1))
        return painter.bed.decode(painter.model, latent).double(), report_of(model)

    def _sigmas(self, sampling: Sampling) -> list[float]:
        import comfy.samplers

        if sampling.schedule in LISTS:
            return list(LISTS[sampling.schedule])
        model_sampling = self.painter.model.get_model_object("model_sampling")
        scheduler = sampling.schedule or self.painter.bed.scheduler
        return comfy.samplers.calculate_sigmas(model_sampling, scheduler, sampling.steps).tolist()


def fitted(records: Iterable[Record]) -> Law | None:
    """The law of one kind of sampler by records of several models, relatives counting as one; None for too few."""
    by_bed: dict[str, list[float]] = {}
    for record in records:
        if record.constant is not None:
            by_bed.setdefault(record.bed, []).append(record.constant)
    families: dict[str, list[float]] = {}
    for bed, constants in by_bed.items():
        families.setdefault(RELATIVES[bed], []).append(fmean(constants))
    if len(families) < 2:
        return None
    means = [fmean(of) for of in families.values()]
    within = math.sqrt(fmean(pstdev(constants) ** 2 for constants in by_bed.values()))
    return Law(fmean(means), stdev(means), within)


def law_in_use(kind: str) -> Law:
    """Of the pack."""
    return EULER if kind == "euler" else MULTISTEP


def judged(records: Sequence[Record], kind: str) -> Iterator[tuple[Record, float]]:
    """Records of the report prompts in which anything was skipped, with the wish in dB that a law without their model
    and its relatives would have made them of."""
    mine = [record for record in records if record.sampling.kind == kind]
    tuning = [record for record in mine if record.prompts == "tuning"]
    for family in dict.fromkeys(record.family for record in mine):
        law = fitted(record for record in tuning if record.family != family)
        if law is None:
            continue
        bolder = law.low - law_in_use(kind).low
        for record in mine:
            if record.family == family and record.prompts == "report" and record.cost < 1:
                yield record, record.wish + bolder


def table(rows: Mapping[str, Mapping[str, str]], corner: str) -> str:
    """Markdown of {row: {column: cell}}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shares(pairs: Sequence[tuple[Record, float]], column: Any) -> dict[str, str]:
    """{column(record): share of pictures that are as close as wished for, and how many}."""
    groups: dict[str, list[bool]] = {}
    for record, wish in pairs:
        met = record.psnr is None or record.psnr >= wish
        for name in (column(record), "all"):
            groups.setdefault(name, []).append(met)
    return {name: f"{fmean(met):.0%} of {len(met)}" for name, met in groups.items()}


def show(records: Sequence[Record]) -> None:
    """The laws, then who met which wish."""
    for kind in ("euler", "second order"):
        law = fitted(r for r in records if r.sampling.kind == kind and r.prompts == "tuning")
        pairs = list(judged(records, kind))
        if not (law and pairs):
            continue
        excess = sorted((CLOSE if r.psnr is None else r.psnr) - wish for r, wish in pairs)
        print(
            f"\n**{kind}**: mean {law.mean:.1f} dB, between models {law.between:.1f}, within {law.within:.1f}; nine of"
            f" ten above {law.low:.1f} (in use {law_in_use(kind).low:.1f}); typically {excess[len(excess) // 2]:.0f} dB"
            " closer than wished for"
        )
        for name, judgements in (("left out", pairs), ("law in use", [(r, r.wish) for r, _ in pairs])):
            beds = dict.fromkeys(record.bed for record, _ in judgements)
            by_bed = {bed: [pair for pair in judgements if pair[0].bed == bed] for bed in beds} | {"all": judgements}
            for column in (lambda r: f"{r.wish:g} dB", lambda r: r.steps_class):
                print("\n" + table({bed: shares(own, column) for bed, own in by_bed.items()}, name))


def read(files: Sequence[Path]) -> list[Record]:
    """Records that were written before."""
    rows = itertools.chain(*(json.loads(file.read_text()) for file in files))
    return [Record(**{**row, "sampling": Sampling(**row["sampling"])}) for row in rows]


def sampled(options: argparse.Namespace) -> list[Record]:
    """Records of all beds and parts of the prompts that the command line asks for."""
    records = []
    for bed, prompts in itertools.product(options.beds, options.prompts):
        count = len(SAMPLINGS) * options.pictures * len(options.wishes)
        records += tqdm(Sampler(bed).records(prompts, options.pictures, options.wishes), f"{bed}, {prompts}", count)
    return records


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="dev.py bench promise", description="As close as asked for, models left out.")
    beds = [bed for bed in BEDS if bed in RELATIVES]
    parser.add_argument("--beds", nargs="+", choices=beds, default=beds, metavar="BED")
    parser.add_argument("--prompts", nargs="+", choices=("tuning", "report"), default=["tuning", "report"])
    parser.add_argument("--pictures", type=int, default=3, help="for each sampling and bed")
    parser.add_argument("--wishes", nargs="+", type=float, default=WISHES, metavar="DB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records")
    parser.add_argument("--tables", nargs="+", type=Path, metavar="FILE", help="of records that were written before")
    return parser.parse_args(words)


def main() -> None:
    """Sample or read, and show the tables."""
    options = parse()
    if options.tables:
        show(read(options.tables))
        return
    records = sampled(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(record) for record in records]))
    show(records)


if __name__ == "__main__":
    with plain_errors():
        main()
