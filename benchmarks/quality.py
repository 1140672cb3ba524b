"""Error against cost of every way to sample with fewer network rows, on every bed, sampler, step count and cfg.

    python dev.py bench quality                                   # 30 Euler steps, cfg 4.5, in some minutes
    python dev.py bench quality --bed unet wan --steps 20 50 --cfg 9 --sampler heun --pictures 8
    python dev.py bench quality --batch 1 --only automatic preset 'fewer steps'
    python dev.py bench quality --node 'LazyCache:reuse_threshold=0.3,start_percent=0.1'
    python dev.py bench quality --all                             # everything, every step count

Methods: fewer steps; the host's EasyCache and LazyCache; the papers' methods at the papers' settings;
every preset of FasterCache; its automatic mode, by the closeness asked for, without and with features among
its actions; nodes named by --node. Cost is network rows; counted operations where features are reused.
What is finished is kept in output/quality/cells.jsonl and not sampled again. Writes summary.json and
frontier.png there and prints a table.
"""
import argparse
import hashlib
import itertools
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from benchmarks.features import count_flops
from benchmarks.tools.comparison import BATCH
from benchmarks.tools.frontier import EQUAL, area, at_cost, frontier, interval
from benchmarks.tools.pictures import closeness
from benchmarks.tools.sampling import SEED, Bench, Result, Run
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

OUTPUT = ROOT / "output" / "quality"
STEPS, CFGS = (8, 12, 20, 30, 50), (1.0, 4.5, 9.0)
SAMPLERS = ("euler", "dpmpp_2m", "uni_pc", "heun", "euler_ancestral", "dpmpp_2m_sde")
SHARES = (0.27, 0.34, 0.4, 0.47, 0.54, 0.6, 0.67, 0.8, 0.94)  # of the steps, where not every count is sampled
THRESHOLDS = {"EasyCache": (0.1, 0.2, 0.4), "LazyCache": (0.05, 0.1, 0.2, 0.3)}
CLOSENESS = (54.0, 50.0, 46.0, 42.0, 39.0, 36.0, 33.0, 30.0)
WITH_FEATURES = (50.0, 46.0, 42.0, 39.0, 36.0)
# The papers' methods at the papers' settings; a node that this pack does not have yet is left out.
PUBLISHED = {"interval": 5, "tolerance": 0.0, "start_percent": 1 / 3, "forecast": "hold", "weights": "paper"}
PAPERS = {"CFG-Cache, paper": ("FasterCacheCFG", PUBLISHED),
          "CFG-Cache, released code": ("FasterCacheCFG", PUBLISHED | {"weights": "released"}),
          "FRDiff": ("FasterCacheFRDiff", {})}
REUSING = ("paper", "with features")  # kinds whose rows cost less than a row: their operations are counted
OURS, CONTROLS = ("automatic", "with features", "preset"), ("fewer steps", "LazyCache", "EasyCache")
COLOURS = {"fewer steps": "black", "LazyCache": "tab:blue", "EasyCache": "tab:cyan", "paper": "tab:orange",
           "preset": "tab:purple", "automatic": "tab:green", "with features": "tab:olive", "node": "tab:red"}


@dataclass(frozen=True)
class Setting:
    """What is sampled: one panel of the figure."""
    bed: str
    steps: int
    cfg: float
    sampler: str

    def __str__(self):
        return f"{self.bed}, {self.sampler}, {self.steps} steps, cfg {self.cfg:g}"


@dataclass(frozen=True, eq=False)
class Method:
    """One way to sample: `kind` is the frontier it belongs to."""
    kind: str
    name: str
    nodes: tuple = ()
    steps: int | None = None  # None: the setting's own
    asked: float | None = None  # PSNR in dB that was asked for


FULL = Method("full", "full")


class Cells:
    """Finished measurements, one JSON object a line, kept over interruptions."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "cells.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.known = {cell["key"]: cell for cell in map(whole, lines) if cell}

    def get(self, key):
        """The finished cell with this key, None when there is none."""
        return self.known.get(key)

    def add(self, key, cell):
        """Keep one more cell, on disk at once."""
        self.known[key] = {"key": key, **cell}
        broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * broken + json.dumps(self.known[key]) + "\n")
        return self.known[key]

    def result(self, key, make):
        """The Result kept under this key, without its report; made and kept when there is none."""
        path = self.folder / "full" / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".npz")
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            result, part = make(), path.with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, pictures=result.pictures, rows=result.rows, seconds=result.seconds)
            part.rename(path)
        with np.load(path) as kept:
            return Result(kept["pictures"], int(kept["rows"]), float(kept["seconds"]), None)


def whole(line):
    """A line's cell, None for a line that an interruption cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def methods(setting, host, arguments):
    """Every Method for a setting, on a host that may lack some nodes."""
    counts = range(2, setting.steps) if arguments.all else sorted({max(2, round(setting.steps * s)) for s in SHARES})
    found = [Method("fewer steps", f"{n} steps", steps=n) for n in counts if n < setting.steps]
    found += [Method(kind, f"{kind} {t:g}", ((kind, {"reuse_threshold": t}),))
              for kind, thresholds in THRESHOLDS.items() for t in thresholds]
    found += [Method("paper", name, (spec,)) for name, spec in PAPERS.items() if inputs_of(host, spec[0])]
    declared = inputs_of(host, "FasterCache")
    for preset in choices(declared["preset"]):
        if preset not in ("none", "off"):
            kind = "paper" if preset == "paper" else "preset"
            found.append(Method(kind, f"FasterCache {preset}", (("FasterCache", {"preset": preset}),)))
    if "closeness" in declared:
        found += [automatic("automatic", closeness) for closeness in CLOSENESS]
        found += [automatic("with features", d, feature_reuse="measured") for d in WITH_FEATURES]
    return found + [Method("node", text, (named_node(text),)) for text in arguments.node]


def automatic(kind, closeness, **inputs):
    """The automatic mode, asked for a closeness in dB."""
    name = f"{closeness:g} dB{', features' if inputs else ''}"
    return Method(kind, name, (("FasterCache", {"closeness": closeness, **inputs}),), asked=closeness)


def inputs_of(host, kind):
    """The declared inputs of a node, empty when the host does not have it."""
    try:
        declared = host.object_info(kind)["input"]
    except KeyError:
        return {}
    return {**declared.get("required", {}), **declared.get("optional", {})}


def choices(spec):
    """The options of a declared choice, in either form that the host uses."""
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def named_node(text):
    """'NodeId:input=value,...' as (node id, inputs); a value is JSON, or else a string."""
    kind, _, rest = text.partition(":")
    pairs = (part.partition("=") for part in rest.split(",") if part)
    return kind, {name.strip(): value_of(value) for name, _, value in pairs}


def value_of(text):
    """A JSON value, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def measure(bench, cells, setting, method, prompts, seed, bar, with_flops=False):
    """The cell of one method on one batch, sampled when it is not known yet."""
    key = json.dumps([asdict(setting), prompts, seed, method.kind, method.nodes, method.steps, with_flops])
    bar.set_description(f"{setting}: {method.name}")
    known = cells.get(key)
    if known is None:
        full = full_run(bench, cells, setting, prompts, seed, bar)
        result = full if method is FULL else bench.sample(run_of(setting, method), prompts, seed, progress(bar))
        flops = count_flops(bench, run_of(setting, method), prompts, seed) if with_flops else None
        known = cells.add(key, {**describe(result, full, setting), "flops": flops})
    bar.update()
    return known


def full_run(bench, cells, setting, prompts, seed, bar):
    """The Result of full sampling, kept on disk."""
    key = json.dumps([asdict(setting), prompts, seed])
    return cells.result(key, lambda: bench.sample(run_of(setting, FULL), prompts, seed, progress(bar)))


def run_of(setting, method):
    """The Run of a method under a setting."""
    run = Run(method.name, method.nodes, steps=setting.steps, cfg=setting.cfg, sampler=setting.sampler)
    return replace(run, steps=method.steps or run.steps)


def progress(bar):
    """A callback that shows the step a run is at."""
    return lambda value, most: bar.set_postfix_str(f"step {value}/{most}")


def describe(result, full, setting):
    """One cell: what a batch cost and how far each of its pictures is from full sampling (both: Result)."""
    psnr, ssim = closeness(result.pictures, full.pictures)
    return {"rows": result.rows, "seconds": result.seconds, "psnr": psnr.clip(max=EQUAL).tolist(),
            "ssim": ssim.tolist(), "lpips": lpips(result.pictures, full.pictures),
            "frames": frame_error(result.pictures, full.pictures, BEDS[setting.bed].frames),
            "notes": (result.report or {}).get("notes", [])}


def frame_error(pictures, full, frames):
    """Root mean square error of what changes from frame to frame, for each clip; None for stills."""
    if frames == 1:
        return None
    split = lambda x: x.reshape(len(x), frames, -1)
    wrong = np.diff(split(pictures), axis=1) - np.diff(split(full), axis=1)
    return np.sqrt((wrong ** 2).mean((1, 2))).tolist()


def lpips(pictures, full):
    """LPIPS (AlexNet) of each picture; None where the network's weights are not on this machine."""
    if not lpips_weights().is_file():
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance
    a, b = (torch.from_numpy(x).movedim(-1, 1).clamp(0, 1) for x in (pictures, full))
    return [float(distance(p[None], q[None], "alex", normalize=True)) for p, q in zip(a, b)]


def lpips_weights():
    """Where torchvision keeps the weights of its AlexNet once they were downloaded."""
    return Path(torch.hub.get_dir(), "checkpoints", "alexnet-owt-7be5be79.pth")


def sample_setting(bench, cells, setting, arguments, bar):
    """{Method: cells, one a batch} for one setting."""
    prompts = bench.bed.prompts(arguments.prompts)[:arguments.pictures]
    batches = [prompts[i:i + arguments.batch] for i in range(0, len(prompts), arguments.batch)]
    wanted = arguments.only or COLOURS
    ways = [FULL, *(method for method in methods(setting, bench.host, arguments) if method.kind in wanted)]
    bar.reset(len(ways) * len(batches))
    counted = {method for method in ways if arguments.flops or method.kind in REUSING}
    counted |= {FULL} if counted else set()
    return {method: [measure(bench, cells, setting, method, batch, SEED + i, bar, method in counted)
                     for i, batch in enumerate(batches)] for method in ways}


def summarise(setting, results):
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


def entry(method, cells, full):
    """One method of the summary, over all batches; full: the cells of full sampling."""
    together = lambda key: None if cells[0][key] is None else list(itertools.chain(*(c[key] for c in cells)))
    rows, flops = share(cells, full, "rows"), share(cells, full, "flops")
    found = {"kind": method.kind, "name": method.name, "cost": rows if flops is None else flops, "rows_cost": rows,
             "flops_cost": flops, "seconds": sum(c["seconds"] for c in cells)}
    for key in ("psnr", "ssim", "lpips", "frames"):
        values = together(key)
        if values is not None:
            found[key], found[f"{key}_95"], least = interval(values)
            found[f"{key}_worst"] = least if key in ("psnr", "ssim") else max(values)
    if method.asked:
        found |= asked_and_given(method.asked, together("psnr"))
    equal = found["psnr"] >= EQUAL and method is not FULL
    return found | {"equal": equal, "notes": cells[0]["notes"] or (["does nothing here"] if equal else [])}


def asked_and_given(asked, psnr):
    """How well a wish was met: "met" = share of pictures at least as close, "above" = dB of the median over it."""
    psnr = np.array(psnr)
    return {"asked": asked, "met": float((psnr >= asked).mean()), "above": float(np.median(psnr) - asked)}


def share(cells, full, key):
    """What was counted over what full sampling counts, None where it was not."""
    if any(c[key] is None for c in (*cells, *full)):
        return None
    return sum(c[key] for c in cells) / sum(c[key] for c in full)


def areas(points):
    """{ours: {control: {"area": dB times cost, "mean": dB}}} between frontiers, where both have points."""
    found = {}
    for ours, control in itertools.product(OURS, CONTROLS):
        if points[ours] and points[control]:
            size, width = area(points[ours], points[control])
            mean = size / width if width else None
            found.setdefault(ours, {})[control] = {"area": size, "width": width, "mean": mean}
    return found


def table(summary):
    """One setting for a person."""
    lines = ["", summary["title"], f"{'':<34} cost   PSNR dB        worst  SSIM    against fewer steps"]
    for run in summary["runs"]:
        gain = "" if run["gain"] is None else f"{run['gain']:+5.1f}"
        psnr = "   equal     " if run["psnr"] >= EQUAL else f"{run['psnr']:5.1f} +- {run['psnr_95']:<4.1f}"
        wish = [f"met by {run['met']:.0%}, median {run['above']:+.1f} dB"] if "met" in run else []
        lines.append(f"{run['name']:<34} {run['cost']:4.2f}  {psnr}  {run['psnr_worst']:5.1f}  {run['ssim']:6.4f}  "
                     f"{gain:6} {'; '.join(wish + run['notes'])}".rstrip())
    for ours, controls in summary["areas"].items():
        lines += [f"{ours} above {control}: {found['mean']:+.1f} dB over {found['width']:.2f} of cost"
                  for control, found in controls.items() if found["mean"] is not None]
    return "\n".join(lines)


def draw(summaries, path):
    """Closeness to full sampling against cost, one panel a setting."""
    columns = min(3, len(summaries))
    rows = -(-len(summaries) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False,
                                  constrained_layout=True)
    for panel in panels.flat[len(summaries):]:
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


def parse(words=None):
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
    parser.add_argument("--node", action="append", default=[], metavar="'NodeId:input=value,...'",
                        help="one more node of the host to measure, may be repeated")
    parser.add_argument("--flops", action="store_true", help="count operations too, in a second run of each")
    parser.add_argument("--all", action="store_true", help="every bed, sampler, step count and cfg")
    arguments = parser.parse_args(words)
    everything, quick = (tuple(BEDS), STEPS, CFGS, SAMPLERS), (("mmdit",), (30,), (4.5,), ("euler",))
    for name, values in zip(("bed", "steps", "cfg", "sampler"), everything if arguments.all else quick):
        if getattr(arguments, name) is None:
            setattr(arguments, name, values)
    return arguments


def main():
    """Sample what is missing, write it down and show it."""
    arguments = parse()
    cells, summaries = Cells(OUTPUT), []
    with Host(threads=2) as host, tqdm(unit="run", disable=None) as bar:
        for setting in map(Setting, *zip(*itertools.product(*(
                getattr(arguments, name) for name in ("bed", "steps", "cfg", "sampler"))))):
            results = sample_setting(Bench(host, setting.bed), cells, setting, arguments, bar)
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
