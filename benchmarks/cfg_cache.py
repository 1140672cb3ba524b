"""CFG-Cache against its published forms and against fewer steps, at 30 and 50 steps, cfg 4.5 and 9.

"default" is the node FasterCacheCFG as it comes. "every2_..." skip every second unconditional pass
and "every5_..." four of five from a third of sampling on, with no tolerance. "late2_..." and "late5_..."
are the same, begun so late that they cost what the default costs. Beside each run: the fewest plain
steps that are not cheaper. Pictures on which a run skips nothing are not in its means. `--bed`
chooses the model: mmdit (default), unet or wan. Writes output/cfg_cache/BED.json and BED.png and
prints the table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from tqdm import tqdm

from benchmarks.tools import intervals
from benchmarks.tools.comparison import BATCH, equal_steps, rotated, sample_each, summarise
from benchmarks.tools.decibels import EQUAL, Results, as_text, gain_over, mean_and_std, psnr
from benchmarks.tools.figures import plt, save
from benchmarks.tools.intervals import FORECASTS, PUBLISHED, SETTINGS, cfg_cache
from benchmarks.tools.sampling import SEED, Bench, Result, Run, chosen_bed
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors

PROMPTS = 16
COLOURS = {"default": "tab:green", **intervals.COLOURS, "steps": "black"}
MARKERS = {"default": "*", "every2": "o", "every5": "^", "late2": "s", "late5": "D"}
OUTPUT = ROOT / "output" / "cfg_cache"


def first_runs() -> list[Run]:
    """What does not depend on the default's cost."""
    return [
        Run("full"),
        Run("default", (("FasterCacheCFG", {}),)),
        *(cfg_cache(f"every2_{name}", forecast, 2) for name, forecast in FORECASTS.items()),
        *(cfg_cache(f"every5_{name}", forecast, 5, 1 / 3) for name, forecast in PUBLISHED.items()),
    ]


def late_runs(rows: int, pictures: int, steps: int) -> list[Run]:
    """The published forms, begun when they cost `rows` network rows, or one pass more a picture."""
    wanted = 2 * steps - rows // pictures
    return [
        cfg_cache(f"late{every}_{name}", forecast, every, late_start(wanted, steps, every))
        for every in (2, 5)
        for name, forecast in PUBLISHED.items()
    ]


def late_start(wanted: int, steps: int, every: int) -> float:
    """The earliest start, as a fraction of sampling, that skips at most `wanted` passes."""
    first = next(k for k in range(1, steps + 1) if skipped(k, steps, every) <= wanted)
    return (first - 0.5) / steps


def skipped(first: int, steps: int, every: int) -> int:
    """Passes skipped by a held difference from evaluation `first` on; the last is always computed."""
    return sum((e - first) % every != every - 1 for e in range(first, steps - 1))


def sample_setting(bench: Bench, prompts: Sequence[str], steps: int, cfg: float) -> dict[str, list[Result]]:
    """{run name: results, one a batch} at one number of steps and cfg."""
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    results: dict[str, list[Result]] = {}
    with tqdm(unit="run", disable=None) as bar:
        for i, batch in enumerate(batches):
            runs = [replace(run, steps=steps, cfg=cfg) for run in rotated(first_runs(), i / len(batches))]
            for name, result in sample_batch(bench, runs, batch, SEED + i, bar).items():
                results.setdefault(name, []).append(result)
    return {"full": results.pop("full"), **results}


def sample_batch(
    bench: Bench, runs: Sequence[Run], prompts: Sequence[str], seed: int, bar: "tqdm[Any]"
) -> dict[str, Result]:
    """{run name: result} for one batch: `runs`, those at the default's cost, then plain steps."""
    steps, cfg = runs[0].steps, runs[0].cfg
    results = dict(sample_each(bench, runs, prompts, seed, bar))
    late = late_runs(results["default"].rows, len(prompts), steps)
    results |= dict(sample_each(bench, [replace(run, steps=steps, cfg=cfg) for run in late], prompts, seed, bar))
    controls = [
        Run(f"steps_{name}", steps=equal_steps(result.rows, len(prompts)), cfg=cfg)
        for name, result in results.items()
        if name != "full"
    ]
    return results | dict(sample_each(bench, controls, prompts, seed, bar))


def describe(results: Results, steps: int, cfg: float) -> dict[str, Any]:
    """One setting of the summary: every run with what it gains, picture by picture, over fewer steps."""
    runs = {entry["name"]: entry for entry in summarise(results)["runs"]}
    for name, entry in runs.items():
        values = psnr(results, name)
        changed = values[values < EQUAL]
        entry |= mean_and_std("psnr", changed) | {"equal": len(values) - len(changed)}
        if f"steps_{name}" in runs:
            entry |= gain_over(results, name, f"steps_{name}")
        if name.startswith(("late", "every")):
            entry |= gain_over(results, "default", name, "default_gain")
    return {"steps": steps, "cfg": cfg, "runs": list(runs.values())}


def table(setting: Mapping[str, Any]) -> str:
    """One setting for a person."""
    runs = {run["name"]: run for run in setting["runs"]}
    lines = [
        "",
        f"{setting['steps']} steps, cfg {setting['cfg']}",
        "run                cost   PSNR dB        fewer steps: cost, PSNR     gain          default's gain",
    ]
    for name, run in runs.items():
        control = runs.get(f"steps_{name}")
        if control:
            lines.append(
                f"{name:<17} {run['cost']:5.3f}  {as_text(run, 'psnr'):<14} {control['cost']:5.3f}  "
                f"{as_text(control, 'psnr'):<14}      {as_text(run, 'gain'):<13} "
                f"{as_text(run, 'default_gain'):<13} {equal_pictures(run)}".rstrip()
            )
    return "\n".join(lines)


def equal_pictures(run: Mapping[str, Any]) -> str:
    """How many pictures are the full run's own, as text; these are not in the means."""
    return f"{run['equal']} pictures equal" if run["equal"] else ""


def draw(settings: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Closeness to full sampling against cost, one panel a setting."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), constrained_layout=True)
    for setting, panel in zip(settings, panels.T.flat):
        draw_panel(panel, setting["runs"])
        panel.set(
            title=f"{setting['steps']} steps, cfg {setting['cfg']:g}",
            xlabel="cost (network rows)",
            ylabel="PSNR to full sampling, dB",
        )
        panel.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=c, label=n, lw=3) for n, c in COLOURS.items()]
    handles += [plt.Line2D([], [], color="gray", marker=m, ls="", label=n) for n, m in MARKERS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9)
    save(figure, path)


def draw_panel(panel: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    """The points of one panel, and the line of fewer steps."""
    runs = [run for run in runs if run["psnr"] is not None]
    plain = sorted((run["cost"], run["psnr"]) for run in runs if run["name"].startswith("steps_"))
    panel.plot(*zip(*plain), color=COLOURS["steps"], lw=1.5)
    for run in runs:
        kind, _, forecast = run["name"].partition("_")
        if kind in MARKERS:
            size, colour = 14 if kind == "default" else 7, COLOURS[forecast or kind]
            panel.plot(run["cost"], run["psnr"], MARKERS[kind], color=colour, ms=size, alpha=0.85, mec="none")


def main() -> None:
    """Run everything and write it down."""
    bed, settings = chosen_bed("dev.py bench cfg_cache"), []
    prompts = BEDS[bed].prompts("report")[:PROMPTS]
    with Host(threads=2) as host:
        for steps, cfg in SETTINGS:
            settings.append(describe(sample_setting(Bench(host, bed), prompts, steps, cfg), steps, cfg))
            print(table(settings[-1]), flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / f"{bed}.json").write_text(json.dumps({"settings": settings}, indent=1))
    draw(settings, OUTPUT / f"{bed}.png")
    print(f"\n{bed}.json and {bed}.png: {OUTPUT}")


if __name__ == "__main__":
    with plain_errors():
        main()
