"""Error against cost of every way to sample with fewer network rows, on every bed, sampler, step count and cfg.

    python dev.py bench quality                                   # 30 Euler steps, cfg 4.5, in some minutes
    python dev.py bench quality --bed unet wan --steps 20 50 --cfg 9 --sampler heun --pictures 8
    python dev.py bench quality --batch 1 --only adaptive preset 'fewer steps'
    python dev.py bench quality --node 'LazyCache:reuse_threshold=0.3,start_percent=0.1'
    python dev.py bench quality --all                             # everything, every step count

Methods: fewer steps; the host's EasyCache and LazyCache; the papers' methods at the papers' settings;
every preset of FasterCache; its adaptive controller, by target PSNR, without and with features among
its actions; nodes named by --node. Cost is network rows; counted operations where features are reused.
Finished cells are stored in output/quality/cells.jsonl and not sampled again. Writes summary.json and
frontier.png there and prints a table.
"""

import argparse
import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.tools.comparison import BATCH
from benchmarks.tools.figures import plt
from benchmarks.tools.frontier import EQUAL, area, at_cost, frontier, interval
from benchmarks.tools.pictures import closeness
from benchmarks.tools.sampling import SEED, Bench, Result, Run
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors

OUTPUT = ROOT / "output" / "quality"
STEPS, CFGS = (8, 12, 20, 30, 50), (1.0, 4.5, 9.0)
SAMPLERS = ("euler", "dpmpp_2m", "uni_pc", "heun", "euler_ancestral", "dpmpp_2m_sde")
SHARES = (0.27, 0.34, 0.4, 0.47, 0.54, 0.6, 0.67, 0.8, 0.94)  # of the steps, where not every count is sampled
THRESHOLDS = {"EasyCache": (0.1, 0.2, 0.4), "LazyCache": (0.05, 0.1, 0.2, 0.3)}
TARGETS = (54.0, 50.0, 46.0, 42.0, 39.0, 36.0, 33.0, 30.0)
WITH_FEATURES = (50.0, 46.0, 42.0, 39.0, 36.0)
# The papers' methods at the papers' settings; a node that this pack does not have yet is left out.
PUBLISHED = {"interval": 5, "tolerance": 0.0, "start_percent": 1 / 3, "forecast": "hold", "weights": "paper"}
PAPERS = {
    "CFG-Cache, paper": ("FasterCacheCFG", PUBLISHED),
    "CFG-Cache, released code": ("FasterCacheCFG", PUBLISHED | {"weights": "released"}),
    "FRDiff": ("FasterCacheFRDiff", {}),
}
REUSING = ("paper", "with features")  # kinds whose rows cost less than a row: their operations are counted
OURS, CONTROLS = ("adaptive", "with features", "preset"), ("fewer steps", "LazyCache", "EasyCache")
COLOURS = {
    "fewer steps": "black",
    "LazyCache": "tab:blue",
    "EasyCache": "tab:cyan",
    "paper": "tab:orange",
    "preset": "tab:purple",
    "adaptive": "tab:green",
    "with features": "tab:olive",
    "node": "tab:red",
}


@dataclass(frozen=True)
class Setting:
    """What is sampled: one panel of the figure."""

    bed: str
    steps: int
    cfg: float
    sampler: str

    def __str__(self) -> str:
        return f"{self.bed}, {self.sampler}, {self.steps} steps, cfg {self.cfg:g}"


@dataclass(frozen=True, eq=False)
class Method:
    """One way to sample: `kind` is the frontier it belongs to."""

    kind: str
    name: str
    nodes: tuple[tuple[str, dict[str, Any]], ...] = ()
    steps: int | None = None  # None: the setting's own
    target: float | None = None  # target PSNR in dB


Cell = dict[str, Any]  # what one batch cost, and how far each of its pictures is from full sampling
FULL = Method("full", "full")


class Cells:
    """Finished measurements, one JSON object a line, that outlast an interruption."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "cells.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.finished = {cell["key"]: cell for cell in map(whole, lines) if cell}

    def get(self, key: str) -> Cell | None:
        """The finished cell with this key, None when there is none."""
        return self.finished.get(key)

    def add(self, key: str, cell: Cell) -> Cell:
        """Store one more cell, on disk at once."""
        self.finished[key] = {"key": key, **cell}
        broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * broken + json.dumps(self.finished[key]) + "\n")
        return self.finished[key]

    def result(self, key: str, make: Callable[[], Result]) -> Result:
        """The Result stored under this key, without its report; made and stored when there is none."""
        path = self.folder / "full" / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".npz")
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            result, part = make(), path.with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, pictures=result.pictures, rows=result.rows, seconds=result.seconds)
            part.rename(path)
        with np.load(path) as stored:
            return Result(stored["pictures"], int(stored["rows"]), float(stored["seconds"]), None)


def whole(line: str) -> Cell | None:
    """A line's cell, None for a line that an interruption cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def methods(setting: Setting, host: Host, options: argparse.Namespace) -> list[Method]:
    """Every Method for a setting, on a host that may lack some nodes."""
    counts = range(2, setting.steps) if options.all else sorted({max(2, round(setting.steps * s)) for s in SHARES})
    plain = [Method("fewer steps", f"{n} steps", steps=n) for n in counts if n < setting.steps]
    caches = [
        Method(kind, f"{kind} {t:g}", ((kind, {"reuse_threshold": t}),))
        for kind, thresholds in THRESHOLDS.items()
        for t in thresholds
    ]
    papers = [Method("paper", name, (spec,)) for name, spec in PAPERS.items() if inputs_of(host, spec[0])]
    named = [Method("node", text, (named_node(text),)) for text in options.node]
    return [*plain, *caches, *papers, *own_methods(inputs_of(host, "FasterCache")), *named]


def own_methods(declared: Mapping[str, Any]) -> Iterable[Method]:
    """The presets of FasterCache and its adaptive controller, as far as its `declared` inputs have them."""
    for preset in choices(declared["preset"]):
        if preset != "none":
            kind = "paper" if preset == "paper" else "preset"
            yield Method(kind, f"FasterCache {preset}", (("FasterCache", {"preset": preset}),))
    if "closeness" in declared:
        yield from (adaptive("adaptive", target) for target in TARGETS)
        yield from (adaptive("with features", target, feature_reuse="fitted") for target in WITH_FEATURES)


def adaptive(kind: str, target: float, **inputs: Any) -> Method:
    """The adaptive controller with a target PSNR in dB."""
    name = f"{target:g} dB{', features' if inputs else ''}"
    return Method(kind, name, (("FasterCache", {"closeness": target, **inputs}),), target=target)


def inputs_of(host: Host, kind: str) -> dict[str, Any]:
    """The declared inputs of a node, empty when the host does not have it."""
    try:
        declared = host.object_info(kind)["input"]
    except KeyError:
        return {}
    return {**declared.get("required", {}), **declared.get("optional", {})}


def choices(spec: Sequence[Any]) -> list[str]:
    """The options of a declared choice, in either form that the host uses."""
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def named_node(text: str) -> tuple[str, dict[str, Any]]:
    """'NodeId:input=value,...' as (node id, inputs); a value is JSON, or else a string."""
    kind, _, rest = text.partition(":")
    pairs = (part.partition("=") for part in rest.split(",") if part)
    return kind, {name.strip(): value_of(value) for name, _, value in pairs}


def value_of(text: str) -> Any:
    """A JSON value, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Batch:
    """Pictures of a setting that are sampled, and decided for, together."""

    setting: Setting
    prompts: list[str]
    seed: int = SEED

    def key(self, *more: Any) -> str:
        """What a cell of the batch is stored under."""
        return json.dumps([asdict(self.setting), self.prompts, self.seed, *more])


def measure(
    bench: Bench, cells: Cells, batch: Batch, method: Method, bar: "tqdm[Any]", with_flops: bool = False
) -> Cell:
    """The cell of one method on one batch, sampled when it is not stored yet."""
    key = batch.key(method.kind, method.nodes, method.steps, with_flops)
    bar.set_description(f"{batch.setting}: {method.name}")
    cell = cells.get(key)
    if cell is None:
        full, run = full_run(bench, cells, batch, bar), run_of(batch.setting, method)
        result = full if method is FULL else bench.sample(run, batch.prompts, batch.seed, progress(bar))
        flops = bench.count_flops(run, batch.prompts, batch.seed) if with_flops else None
        cell = cells.add(key, {**describe(result, full, batch.setting), "flops": flops})
    bar.update()
    return cell


def full_run(bench: Bench, cells: Cells, batch: Batch, bar: "tqdm[Any]") -> Result:
    """The Result of full sampling, stored on disk."""
    run = run_of(batch.setting, FULL)
    return cells.result(batch.key(), lambda: bench.sample(run, batch.prompts, batch.seed, progress(bar)))


def run_of(setting: Setting, method: Method) -> Run:
    """The Run of a method under a setting."""
    run = Run(method.name, method.nodes, steps=setting.steps, cfg=setting.cfg, sampler=setting.sampler)
    return replace(run, steps=method.steps or run.steps)


def progress(bar: "tqdm[Any]") -> Callable[[int, int], None]:
    """A callback that shows the step a run is at."""
    return lambda value, most: bar.set_postfix_str(f"step {value}/{most}")


def describe(result: Result, full: Result, setting: Setting) -> Cell:
    """One cell: what a batch cost and how far each of its pictures is from full sampling (both: Result)."""
    psnr, ssim = closeness(result.pictures, full.pictures)
    return {
        "rows": result.rows,
        "seconds": result.seconds,
        "psnr": psnr.clip(max=EQUAL).tolist(),
        "ssim": ssim.tolist(),
        "lpips": lpips(result.pictures, full.pictures),
        "frames": frame_error(result.pictures, full.pictures, BEDS[setting.bed].frames),
        "notes": (result.report or {}).get("notes", []),
    }


def frame_error(pictures: np.ndarray, full: np.ndarray, frames: int) -> list[float] | None:
    """Root mean square error of what changes from frame to frame, for each clip; None for stills."""
    if frames == 1:
        return None
    ours, true = (x.reshape(len(x), frames, -1) for x in (pictures, full))
    errors = np.diff(ours, axis=1) - np.diff(true, axis=1)
    return np.sqrt((errors**2).mean((1, 2))).tolist()


def lpips(pictures: np.ndarray, full: np.ndarray) -> list[float] | None:
    """LPIPS (AlexNet) of each picture; None where the network's weights are not on this machine."""
    if not lpips_weights().is_file():
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    a, b = (torch.from_numpy(x).movedim(-1, 1).clamp(0, 1) for x in (pictures, full))
    return [float(distance(p[None], q[None], "alex", normalize=True)) for p, q in zip(a, b)]


def lpips_weights() -> Path:
    """Where torchvision stores the weights of its AlexNet once they were downloaded."""
    return Path(torch.hub.get_dir(), "checkpoints", "alexnet-owt-7be5be79.pth")


def sample_setting(
    bench: Bench, cells: Cells, setting: Setting, options: argparse.Namespace, bar: "tqdm[Any]"
) -> dict[Method, list[Cell]]:
    """{Method: cells, one a batch} for one setting."""
    prompts = bench.bed.prompts(options.prompts)[: options.pictures]
    starts = range(0, len(prompts), options.batch)
    batches = [Batch(setting, prompts[i : i + options.batch], SEED + n) for n, i in enumerate(starts)]
    wanted = options.only or COLOURS
    chosen = [FULL, *(method for method in methods(setting, bench.host, options) if method.kind in wanted)]
    bar.reset(len(chosen) * len(batches))
    counted = {method for method in chosen if options.flops or method.kind in REUSING}
    counted |= {FULL} if counted else set()
    return {
        method: [measure(bench, cells, batch, method, bar, method in counted) for batch in batches] for method in chosen
    }


def summarise(setting: Setting, results: Mapping[Method, Sequence[Cell]]) -> dict[str, Any]:
    """One setting of the summary: every method, and how far our frontiers are above the controls'."""
    entries = [entry(method, cells, results[FULL]) for method, cells in results.items()]
    points = defaultdict(list)
    for one in entries:
        if one["kind"] != "full" and one["cost"] < 1:
            points[one["kind"]].append((one["cost"], one["psnr"]))
    for one in entries:
        plain = at_cost(points["fewer steps"], one["cost"]) if points["fewer steps"] else None
        one["gain"] = one["psnr"] - plain if plain is not None and one["psnr"] < EQUAL else None
    return {"setting": asdict(setting), "title": str(setting), "runs": entries, "areas": areas(points)}


def entry(method: Method, cells: Sequence[Cell], full: Sequence[Cell]) -> dict[str, Any]:
    """One method of the summary, over all batches; full: the cells of full sampling."""
    rows, flops = share(cells, full, "rows"), share(cells, full, "flops")
    row = {
        "kind": method.kind,
        "name": method.name,
        "cost": rows if flops is None else flops,
        "rows_cost": rows,
        "flops_cost": flops,
        "seconds": sum(c["seconds"] for c in cells),
    }
    for key in ("psnr", "ssim", "lpips", "frames"):
        if cells[0][key] is not None:
            values = together(cells, key)
            row[key], row[f"{key}_95"], least = interval(values)
            row[f"{key}_worst"] = least if key in ("psnr", "ssim") else max(values)
    if method.target:
        row |= target_met(method.target, together(cells, "psnr"))
    equal = row["psnr"] >= EQUAL and method is not FULL
    return row | {"equal": equal, "notes": cells[0]["notes"] or (["does nothing here"] if equal else [])}


def together(cells: Sequence[Cell], key: str) -> list[float]:
    """One value a picture, over all batches."""
    return list(itertools.chain(*(cell[key] for cell in cells)))


def target_met(target: float, psnr: Sequence[float]) -> dict[str, float]:
    """How well a target was met: "met" = share of pictures at least as close, "above" = dB of the median over it."""
    values = np.array(psnr)
    return {"target": target, "met": float((values >= target).mean()), "above": float(np.median(values) - target)}


def share(cells: Sequence[Cell], full: Sequence[Cell], key: str) -> float | None:
    """What was counted over what full sampling counts, None where it was not."""
    if any(c[key] is None for c in (*cells, *full)):
        return None
    return sum(c[key] for c in cells) / sum(c[key] for c in full)


def areas(points: Mapping[str, list[tuple[float, float]]]) -> dict[str, dict[str, Any]]:
    """{ours: {control: {"area": dB times cost, "mean": dB}}} between frontiers, where both have points."""
    between: dict[str, dict[str, Any]] = {}
    for ours, control in itertools.product(OURS, CONTROLS):
        if points.get(ours) and points.get(control):
            size, width = area(points[ours], points[control])
            mean = size / width if width else None
            between.setdefault(ours, {})[control] = {"area": size, "width": width, "mean": mean}
    return between


def table(summary: Mapping[str, Any]) -> str:
    """One setting for a person."""
    lines = ["", summary["title"], f"{'':<34} cost   PSNR dB        worst  SSIM    against fewer steps"]
    for run in summary["runs"]:
        gain = "" if run["gain"] is None else f"{run['gain']:+5.1f}"
        psnr = "   equal     " if run["psnr"] >= EQUAL else f"{run['psnr']:5.1f} +- {run['psnr_95']:<4.1f}"
        target = [f"met by {run['met']:.0%}, median {run['above']:+.1f} dB"] if "met" in run else []
        lines.append(
            f"{run['name']:<34} {run['cost']:4.2f}  {psnr}  {run['psnr_worst']:5.1f}  {run['ssim']:6.4f}  "
            f"{gain:6} {'; '.join(target + run['notes'])}".rstrip()
        )
    for ours, controls in summary["areas"].items():
        lines += [
            f"{ours} above {control}: {between['mean']:+.1f} dB over {between['width']:.2f} of cost"
            for control, between in controls.items()
            if between["mean"] is not None
        ]
    return "\n".join(lines)


def draw(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Closeness to full sampling against cost, one panel a setting."""
    columns = min(3, len(summaries))
    rows = -(-len(summaries) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False, constrained_layout=True
    )
    for panel in panels.flat[len(summaries) :]:
        panel.set_axis_off()
    for summary, panel in zip(summaries, panels.flat):
        for kind, colour in COLOURS.items():
            points = [(run["cost"], run["psnr"]) for run in summary["runs"] if run["kind"] == kind and not run["equal"]]
            if points:
                panel.plot(*zip(*points), "o", color=colour, ms=4)
                panel.plot(*zip(*frontier(points)), color=colour, lw=1.2)
        panel.set(title=summary["title"], xlabel="cost", ylabel="PSNR to full sampling, dB")
        panel.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=colour, marker="o", label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --all widens what is not given."""
    parser = argparse.ArgumentParser(prog="dev.py bench quality", description="Error against cost of every method.")
    parser.add_argument("--bed", nargs="+", choices=BEDS, metavar="BED", help="models: " + ", ".join(BEDS))
    parser.add_argument("--steps", nargs="+", type=int)
    parser.add_argument("--cfg", nargs="+", type=float)
    parser.add_argument("--sampler", nargs="+")
    parser.add_argument("--prompts", choices=("tuning", "report"), default="report")
    parser.add_argument("--pictures", type=int, default=24, help="at most so many prompts")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures sampled, and decided for, together")
    parser.add_argument("--only", nargs="+", choices=COLOURS, metavar="KIND", help="methods: " + ", ".join(COLOURS))
    parser.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="'NodeId:input=value,...'",
        help="one more node of the host to measure, may be repeated",
    )
    parser.add_argument("--flops", action="store_true", help="count operations too, in a second run of each")
    parser.add_argument("--all", action="store_true", help="every bed, sampler, step count and cfg")
    options = parser.parse_args(words)
    everything, quick = (tuple(BEDS), STEPS, CFGS, SAMPLERS), (("mmdit",), (30,), (4.5,), ("euler",))
    for name, values in zip(("bed", "steps", "cfg", "sampler"), everything if options.all else quick):
        if getattr(options, name) is None:
            setattr(options, name, values)
    return options


def settings(options: argparse.Namespace) -> list[Setting]:
    """Every combination that the command line asks for."""
    return [Setting(*values) for values in itertools.product(options.bed, options.steps, options.cfg, options.sampler)]


def main() -> None:
    """Sample what is missing, write it down and show it."""
    options = parse()
    cells, summaries = Cells(OUTPUT), []
    with Host(threads=2) as host, tqdm(unit="run", disable=None) as bar:
        for setting in settings(options):
            results = sample_setting(Bench(host, setting.bed), cells, setting, options, bar)
            summaries.append(summarise(setting, results))
            tqdm.write(table(summaries[-1]))
    (OUTPUT / "summary.json").write_text(json.dumps({"settings": summaries}, indent=1))
    draw(summaries, OUTPUT / "frontier.png")
    if not lpips_weights().is_file():
        print(f"\nLPIPS is left out: its network's weights are not at {lpips_weights()}.")
    print(f"\nsummary.json, frontier.png and cells.jsonl: {OUTPUT}")


if __name__ == "__main__":
    with plain_errors():
        main()
