"""What feature reuse gains: every depth with every forecast, in place of every second evaluation.

Cost is counted FLOPs, because a row with features from the cache is cheaper than a computed one. Beside
each run stand the fewest plain steps that are not cheaper. Further runs keep the features in smaller
dtypes, or skip steps instead; at last `fitted` and `hold` are timed
in turn. `--bed` chooses the models. Writes output/features/BED.json, prints the tables, and draws
docs/images/feature_depths.png of every bed that has a summary: what comes closest at every cost, and
which depth gains most within every memory budget.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from tqdm import tqdm

from benchmarks.tools.comparison import BATCH, plain_steps, rotated, sample_each
from benchmarks.tools.decibels import EQUAL, Results, as_text, gain_over, mean_and_std, psnr
from benchmarks.tools.figures import plt, save
from benchmarks.tools.sampling import SEED, STEPS, Bench, Result, Run
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors

PROMPTS = 16
FORECASTS = {"hold": "tab:blue", "ramp": "tab:cyan", "constant": "tab:orange", "fitted": "tab:green"}
DEPTHS = {"attention": "o", "all attention": "^", "half of the blocks": "s", "all blocks": "D", "inside of a UNet": "v"}
# What each model has: it would take a depth that it lacks for another one.
OWN_DEPTHS = {
    "mmdit": ("attention", "half of the blocks", "all blocks"),
    "unet": ("attention", "all attention", "inside of a UNet"),
    "wan": ("attention", "all attention", "half of the blocks", "all blocks"),
}
CLOSENESS = (50, 42, 36)  # dB asked of skipped steps: what the presets ask
LATE = 0.12  # start of "hold" at which it is first used where "fitted" is, at the same cost
TURNS = 9  # of each run that is timed
PICTURE = ROOT / "docs" / "images" / "feature_depths.png"
OUTPUT = ROOT / "output" / "features"


def reuse(depth: str, forecast: str = "fitted", dtype: str = "native", start: float = 0.0, name: str = "") -> Run:
    """A run of FasterCache that reuses features."""
    inputs = {
        "preset": "none",
        "feature_reuse": forecast,
        "reuse_depth": depth,
        "memory_dtype": dtype,
        "start_percent": start,
    }
    return Run(name or f"{depth}, {forecast}", (("FasterCache", inputs),))


def steps_skipped(closeness: float) -> Run:
    """A run of FasterCache that reuses no features but skips steps."""
    return Run(f"steps skipped, {closeness} dB", (("FasterCache", {"closeness": closeness}),))


def runs_of(bed: str) -> list[Run]:
    """Every run on a bed but the plain ones."""
    depths = OWN_DEPTHS[bed]
    return [
        *(reuse(depth, forecast) for depth in depths for forecast in FORECASTS),
        *(reuse(depth, "hold", start=LATE, name=f"{depth}, hold, later") for depth in depths),
        reuse(depths[-1], dtype="fp16", name=f"{depths[-1]}, fitted, fp16"),
        *(reuse(depth, dtype="fp8", name=f"{depth}, fitted, fp8") for depth in depths),
        *map(steps_skipped, CLOSENESS),
    ]


def sample_all(bench: Bench, runs: Sequence[Run], batches: Sequence[Sequence[str]]) -> dict[str, list[Result]]:
    """{run name: results, one a batch}."""
    results: dict[str, list[Result]] = {}
    with tqdm(total=len(runs) * len(batches), unit="run", disable=None) as bar:
        for i, batch in enumerate(batches):
            for name, result in sample_each(bench, runs, batch, SEED + i, bar):
                results.setdefault(name, []).append(result)
    return results


def cost_of(bench: Bench, run: Run, results: Results, prompts: Sequence[str]) -> float:
    """FLOPs of a run as a share of full sampling's.

    Without feature reuse they go with the rows. With it they are counted, on few `prompts`: the schedule
    does not look at pictures.
    """
    inputs = run.nodes[0][1]
    if "feature_reuse" not in inputs:
        return sum(r.rows for r in results[run.name]) / sum(r.rows for r in results["full"])
    full, mine = (bench.count_flops(which, prompts) for which in (Run("full"), run))
    return mine / full


def sample_bed(
    bench: Bench, runs: Sequence[Run], batches: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[Result]]]:
    """({run name: cost}, {run name: results, one a batch}) of full sampling, the runs and their controls."""
    results = sample_all(bench, [Run("full"), *runs], batches)
    cost = {run.name: cost_of(bench, run, results, batches[0][:1]) for run in runs}
    return cost, results | sample_all(bench, plain_runs(cost.values()), batches)


def plain_runs(costs: Iterable[float]) -> list[Run]:
    """A control for each cost, each once."""
    counts = {plain_steps(cost, STEPS) for cost in costs}
    return [Run(plain_name(steps), steps=steps) for steps in sorted(counts - {STEPS})]


def plain_name(steps: int) -> str:
    """The run of so many plain steps."""
    return "full" if steps == STEPS else f"{steps} steps"


def describe(cost: Mapping[str, float], results: Results) -> list[dict[str, Any]]:
    """Every run of a bed with what it gains, picture by picture, over fewer steps at its cost."""
    return [described(name, results, cost) for name in results]


def described(name: str, results: Results, cost: Mapping[str, float]) -> dict[str, Any]:
    """One run; pictures that equal full sampling's are not in its means. A plain run costs its steps; one that
    saves less than a step has no control."""
    report = results[name][0].report or {"totals": {"peak_cache_bytes": {}}, "notes": []}
    values = psnr(results, name)
    entry = {
        "name": name,
        **mean_and_std("psnr", values[values < EQUAL]),
        "notes": report["notes"],
        "MB": sum(report["totals"]["peak_cache_bytes"].values()) / 1e6,
    }
    if name not in cost:
        return entry | {"cost": 1.0 if name == "full" else int(name.split()[0]) / STEPS}
    plain = plain_name(plain_steps(cost[name], STEPS))
    gain = gain_over(results, name, plain) if plain != "full" else {}
    return entry | {"cost": cost[name], "plain": plain} | gain


def timed(bench: Bench, depth: str, prompts: Sequence[str]) -> float:
    """Seconds of `fitted` over those of `hold` at the same cost: median of pairs that take turns to be first."""
    hold, ratios = f"{depth}, hold, later", []
    for turn in range(TURNS):
        pair = rotated([reuse(depth, "hold", start=LATE, name=hold), reuse(depth)], turn % 2 / 2)
        seconds = {run.name: bench.sample(run, prompts).seconds for run in pair}
        ratios.append(seconds[f"{depth}, fitted"] / seconds[hold])
    return statistics.median(ratios)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs of a bed for a person."""
    lines = ["run                              cost  PSNR dB        fewer steps    gain           ahead      MB"]
    plain = {run["name"]: run for run in runs}
    for run in runs:
        if "plain" in run:
            ahead = f"{run['gain_ahead']} of {run['gain_pictures']}" if "gain" in run else ""
            lines.append(
                f"{run['name']:<32} {run['cost']:5.3f}  {as_text(run, 'psnr'):<14} "
                f"{as_text(plain[run['plain']], 'psnr'):<14} {as_text(run, 'gain'):<14} "
                f"{ahead:<9} {run['MB']:6.1f}  {'; '.join(run['notes'])}".rstrip()
            )
    return "\n".join(lines)


def picture() -> None:
    """Draw docs/images/feature_depths.png from what is in output/features."""
    summaries = {bed: json.loads(file.read_text()) for bed in BEDS if (file := OUTPUT / f"{bed}.json").is_file()}
    figure, panels = plt.subplots(
        2, len(summaries), figsize=(4.2 * len(summaries), 8.0), squeeze=False, constrained_layout=True
    )
    for (upper, lower), (bed, summary) in zip(panels.T, summaries.items()):
        runs = {run["name"]: run for run in summary["runs"] if run["psnr"] is not None}
        draw_costs(upper, bed, runs)
        draw_budgets(lower, bed, runs)
    lines = [plt.Line2D([], [], color=c, label=n, lw=3) for n, c in FORECASTS.items()]
    lines += [plt.Line2D([], [], color="gray", marker=m, ls="", label=n) for n, m in DEPTHS.items()]
    lines += [plt.Line2D([], [], color="gray", marker="o", mfc="none", ls="", label="stored in fp8")]
    lines += [
        plt.Line2D([], [], color="black", label="fewer steps"),
        plt.Line2D([], [], color="tab:red", ls="--", label="whole steps skipped"),
        plt.Line2D([], [], color="black", ls=":", label="the best in so much memory"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=9)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    save(figure, PICTURE)


def draw_costs(panel: Axes, bed: str, runs: Mapping[str, Any]) -> None:
    """One bed: closeness to full sampling against cost."""
    for wanted, line in ((" steps", "k-"), ("steps skipped", "r--")):
        points = sorted((run["cost"], run["psnr"]) for name, run in runs.items() if wanted in name)
        panel.plot(*zip(*points), line, lw=1.5)
    for depth in OWN_DEPTHS[bed]:
        for forecast, colour in FORECASTS.items():
            run = runs[f"{depth}, {forecast}"]
            panel.plot(run["cost"], run["psnr"], DEPTHS[depth], color=colour, ms=8, alpha=0.85, mec="none")
    panel.set(title=BEDS[bed].model, xlabel="cost (counted FLOPs)", ylabel="PSNR to full sampling, dB")
    panel.grid(alpha=0.3)


def draw_budgets(panel: Axes, bed: str, runs: Mapping[str, Any]) -> None:
    """One bed: what every choice gains over fewer steps at its cost, against its memory, and the best of them."""
    choices = list(itertools.product(OWN_DEPTHS[bed], FORECASTS, ("native", "fp8")))
    points = [(run["MB"], run["gain"], *c) for c in choices if "gain" in (run := runs.get(name_of(*c), {}))]
    for megabytes, gain, depth, forecast, dtype in points:
        fill = "none" if dtype == "fp8" else FORECASTS[forecast]
        panel.plot(megabytes, gain, DEPTHS[depth], color=FORECASTS[forecast], ms=8, alpha=0.85, mfc=fill)
    budgets = sorted(p[0] for p in points)
    best = [max(p[1] for p in points if p[0] <= budget) for budget in budgets]
    panel.step([*budgets, budgets[-1] * 1.3], [*best, best[-1]], "k:", where="post", lw=1.5, zorder=0)
    panel.axhline(0, color="gray", lw=0.8)
    panel.set(xlabel="memory of 8 pictures' features, MB", ylabel="gain over fewer steps, dB", xscale="log")
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.grid(alpha=0.3)


def name_of(depth: str, forecast: str, dtype: str) -> str:
    """The name of a run."""
    return f"{depth}, {forecast}" + ("" if dtype == "native" else f", {dtype}")


def measure(host: Host, bed: str) -> None:
    """Everything about one bed; writes its summary and prints its table."""
    prompts = BEDS[bed].prompts("report")[:PROMPTS]
    batches = [prompts[i : i + BATCH] for i in range(0, PROMPTS, BATCH)]
    bench = Bench(host, bed)
    bench.sample(Run("warm-up", steps=2), batches[0])  # loads the model
    runs = describe(*sample_bed(bench, runs_of(bed), batches))
    ratio = timed(bench, OWN_DEPTHS[bed][0], batches[0])
    (OUTPUT / f"{bed}.json").write_text(json.dumps({"bed": bed, "runs": runs, "fitted_over_hold": ratio}, indent=1))
    print(f"\n{bed}\n{table(runs)}\nseconds of fitted over hold, {OWN_DEPTHS[bed][0]}: {ratio:.3f}", flush=True)


def main() -> None:
    """Measure the chosen beds and draw the figure."""
    parser = argparse.ArgumentParser(prog="dev.py bench features")
    parser.add_argument("--bed", choices=list(BEDS), action="append", help="a model; may be repeated (default: all)")
    beds = parser.parse_args().bed or list(BEDS)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with Host(threads=2) as host:
        for bed in beds:
            measure(host, bed)
    picture()
    print(f"\nSummaries: {OUTPUT}; figure: {PICTURE}")


if __name__ == "__main__":
    with plain_errors():
        main()
