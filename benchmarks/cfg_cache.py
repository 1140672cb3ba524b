"""CFG-Cache against its published forms and against fewer steps, at 30 and 50 steps, cfg 4.5 and 9.

"default" is the node FasterCacheCFG as it comes. "every2_..." skip every second unconditional pass
and "every5_..." four of five from a third of sampling on, with no gate. "late2_..." and "late5_..."
are the same, begun so late that they cost what the default costs. Beside each run: the fewest plain
steps that are not cheaper. Pictures on which a run skips nothing are not in its means. `--bed`
chooses the model: mmdit (default), unet or wan. Writes output/cfg_cache/BED.json and BED.png and
prints the table.
"""
import argparse
import json
from dataclasses import replace

import matplotlib
import numpy as np
from benchmarks.tools.comparison import BATCH, equal_steps, rotated, sample_each, summarise
from benchmarks.tools.pictures import closeness
from benchmarks.tools.sampling import SEED, Bench, Run
from PIL import Image
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SETTINGS = [(30, 4.5), (50, 4.5), (30, 9.0), (50, 9.0)]
PROMPTS = 16
PUBLISHED = {"hold": {"forecast": "hold"},
             "paper": {"forecast": "hold", "weights": "paper"},
             "released": {"forecast": "hold", "weights": "released"}}
FORECASTS = {**PUBLISHED, "linear": {"forecast": "linear"}, "measured": {"forecast": "measured"}}
COLOURS = {"default": "tab:green", "measured": "tab:purple", "linear": "tab:cyan", "hold": "tab:blue",
           "paper": "tab:orange", "released": "tab:red", "steps": "black"}
MARKERS = {"default": "*", "every2": "o", "every5": "^", "late2": "s", "late5": "D"}
EQUAL = 200.0  # dB, in place of infinity
OUTPUT = ROOT / "output" / "cfg_cache"


def cfg_cache(name, forecast, every, start=0.0):
    """A run of FasterCacheCFG at a fixed interval."""
    inputs = {**forecast, "interval": every, "tolerance": 0.0, "start_percent": start}
    return Run(name, (("FasterCacheCFG", inputs),))


def first_runs():
    """What does not depend on the default's cost."""
    return [
        Run("full"),
        Run("default", (("FasterCacheCFG", {}),)),
        *(cfg_cache(f"every2_{name}", forecast, 2) for name, forecast in FORECASTS.items()),
        *(cfg_cache(f"every5_{name}", forecast, 5, 1 / 3) for name, forecast in PUBLISHED.items()),
    ]


def late_runs(rows, pictures, steps):
    """The published forms, begun when they cost `rows` network rows, or one pass more a picture."""
    wanted = 2 * steps - rows // pictures
    return [cfg_cache(f"late{every}_{name}", forecast, every, late_start(wanted, steps, every))
            for every in (2, 5) for name, forecast in PUBLISHED.items()]


def late_start(wanted, steps, every):
    """The earliest start, as a fraction of sampling, that skips at most `wanted` passes."""
    first = next(k for k in range(1, steps + 1) if skipped(k, steps, every) <= wanted)
    return (first - 0.5) / steps


def skipped(first, steps, every):
    """Passes skipped by a held difference from evaluation `first` on; the last is always computed."""
    return sum((e - first) % every != every - 1 for e in range(first, steps - 1))


def sample_setting(bench, prompts, steps, cfg):
    """{run name: results, one per batch} at one number of steps and cfg."""
    batches = [prompts[i:i + BATCH] for i in range(0, len(prompts), BATCH)]
    results = {}
    with tqdm(unit="run", disable=None) as bar:
        for i, batch in enumerate(batches):
            ways = rotated(first_runs(), i / len(batches))
            for name, result in sample_batch(bench, ways, batch, steps, cfg, SEED + i, bar).items():
                results.setdefault(name, []).append(result)
    return {"full": results.pop("full"), **results}


def sample_batch(bench, ways, prompts, steps, cfg, seed, bar):
    """{run name: result} for one batch: fixed runs, those at the default's cost, then plain steps."""
    at = lambda runs: [replace(run, steps=steps, cfg=cfg) for run in runs]
    results = dict(sample_each(bench, at(ways), prompts, seed, bar))
    late = late_runs(results["default"].rows, len(prompts), steps)
    results |= dict(sample_each(bench, at(late), prompts, seed, bar))
    controls = [Run(f"steps_{name}", steps=equal_steps(result.rows, len(prompts)), cfg=cfg)
                for name, result in results.items() if name != "full"]
    return results | dict(sample_each(bench, controls, prompts, seed, bar))


def describe(results, steps, cfg):
    """One setting of the summary: every run with what it gains, picture by picture, over fewer steps."""
    runs = {entry["name"]: entry for entry in summarise(results)["runs"]}
    for name, entry in runs.items():
        values = psnr(results, name)
        changed = values[values < EQUAL]
        entry |= numbers("psnr", changed) | {"equal": len(values) - len(changed)}
        if f"steps_{name}" in runs:
            entry |= against(results, name, f"steps_{name}", "gain")
        if name.startswith(("late", "every")):
            entry |= against(results, "default", name, "default_gain")
    return {"steps": steps, "cfg": cfg, "runs": list(runs.values())}


def against(results, name, other, label):
    """PSNR of one run less that of another, on the pictures where the first one skips at all."""
    mine = psnr(results, name)
    gain = (mine - psnr(results, other))[mine < EQUAL]
    return numbers(label, gain) | {f"{label}_ahead": int((gain > 0).sum()), f"{label}_pictures": len(gain)}


def numbers(label, values):
    """Mean and standard deviation, None for no values."""
    known = len(values) > 0
    return {label: float(values.mean()) if known else None, f"{label}_std": float(values.std()) if known else None}


def psnr(results, name):
    """PSNR of every picture of a run against full sampling; EQUAL for the very same one."""
    pairs = zip(results[name], results["full"])
    return np.concatenate([closeness(a.pictures, b.pictures)[0] for a, b in pairs]).clip(max=EQUAL)


def table(setting):
    """One setting for a person."""
    runs = {run["name"]: run for run in setting["runs"]}
    lines = ["", f"{setting['steps']} steps, cfg {setting['cfg']}",
             "run                cost   PSNR dB        fewer steps: cost, PSNR     gain          default's gain"]
    for name, run in runs.items():
        control = runs.get(f"steps_{name}")
        if control:
            lines.append(f"{name:<17} {run['cost']:5.3f}  {decibels(run, 'psnr'):<14} {control['cost']:5.3f}  "
                         f"{decibels(control, 'psnr'):<14}      {decibels(run, 'gain'):<13} "
                         f"{decibels(run, 'default_gain'):<13} {equal(run)}".rstrip())
    return "\n".join(lines)


def decibels(run, key):
    """A mean with its standard deviation as text."""
    value = run.get(key)
    return ("equal" if key == "psnr" else "") if value is None else f"{value:.1f} +- {run[key + '_std']:.1f}"


def equal(run):
    """How many pictures are the full run's own, as text; these are not in the means."""
    return f"{run['equal']} pictures equal" if run["equal"] else ""


def frontier(settings, path):
    """Closeness to full sampling against cost, one panel a setting."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), constrained_layout=True)
    for setting, panel in zip(settings, panels.T.flat):
        draw(panel, setting["runs"])
        panel.set(title=f"{setting['steps']} steps, cfg {setting['cfg']:g}", xlabel="cost (network rows)",
                  ylabel="PSNR to full sampling, dB")
        panel.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=c, label=n, lw=3) for n, c in COLOURS.items()]
    handles += [plt.Line2D([], [], color="gray", marker=m, ls="", label=n) for n, m in MARKERS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9)
    save(figure, path)


def save(figure, path):
    """Write a figure as a small PNG of 256 colours."""
    figure.savefig(path, dpi=90)
    plt.close(figure)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def draw(panel, runs):
    """The points of one panel, and the line of fewer steps."""
    runs = [run for run in runs if run["psnr"] is not None]
    plain = sorted((run["cost"], run["psnr"]) for run in runs if run["name"].startswith("steps_"))
    panel.plot(*zip(*plain), color=COLOURS["steps"], lw=1.5)
    for run in runs:
        kind, _, forecast = run["name"].partition("_")
        if kind in MARKERS:
            panel.plot(run["cost"], run["psnr"], MARKERS[kind], color=COLOURS[forecast or kind],
                       ms=14 if kind == "default" else 7, alpha=0.85, mec="none")


def chosen_bed():
    """The bed of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bed", choices=list(BEDS), default="mmdit", help="the model")
    return parser.parse_args().bed


def main():
    """Run everything and write it down."""
    bed, settings = chosen_bed(), []
    prompts = BEDS[bed].prompts("report")[:PROMPTS]
    with Host(threads=2) as host:
        for steps, cfg in SETTINGS:
            settings.append(describe(sample_setting(Bench(host, bed), prompts, steps, cfg), steps, cfg))
            print(table(settings[-1]), flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / f"{bed}.json").write_text(json.dumps({"settings": settings}, indent=1))
    frontier(settings, OUTPUT / f"{bed}.png")
    print(f"\n{bed}.json and {bed}.png: {OUTPUT}")


if __name__ == "__main__":
    with plain_errors():
        main()
