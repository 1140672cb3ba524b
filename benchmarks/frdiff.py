"""FRDiff as published and as found by search, beside fewer steps and beside a second-order solver.

Part 1, per bed, at 30 and 50 Euler steps (`--steps`): FRDiff with one keyframe in 2 and in 3 (as published, scores
held throughout, features reused throughout) and the policies of FasterCacheAutoFR, found on tuning
prompts. Beside each run stand the fewest plain steps that cost no less in counted FLOPs, beside some
dpmpp_2m at that cost too; all of them also against the converged solution (dpmpp_2m at many steps).
Part 2 (`--samplers`): FRDiff with every sampler of the host, against full sampling with it.
Writes output/frdiff/BED.json and pictures side by side, and prints the tables. `--bed` chooses the model.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from tqdm import tqdm

from benchmarks.tools.comparison import BATCH, plain_steps, rotated, sample_each
from benchmarks.tools.decibels import Results, as_text, gain_over, mean_and_std, psnr
from benchmarks.tools.pictures import sheet
from benchmarks.tools.sampling import SEED, Bench, Result, Run
from testbed.beds import BEDS, node
from testbed.server import ROOT, Host, plain_errors

LEARNT = 8  # prompts that Auto-FR learns from
STEPS = (30, 50)
CONVERGED = Run("converged", steps=64, sampler="dpmpp_2m")
FIXED = ("full", "converged")
BUDGETS = {"exact search": (0.5, 0.35), "gradient": (0.5,)}
BESIDE_SECOND_ORDER = ("1 in 2, paper", "1 in 3, paper", "exact search 0.5", "exact search 0.35")
SHOWN = ("full", "exact search 0.5", "exact search 0.35", "gradient 0.5", "1 in 2, paper", "1 in 3, paper")
SAMPLER_STEPS, SAMPLER_PICTURES = 20, 4
OUTPUT = ROOT / "output" / "frdiff"


class PolicyBench(Bench):
    """Samples with policies: a run whose node takes one names its file."""

    def workflow(self, run: Run, prompts: Sequence[str], seed: int) -> dict[str, Any]:
        """The API-format graph of one run, with the policy's file."""
        graph = super().workflow(run, prompts, seed)
        for name in [name for name, n in graph.items() if n["inputs"].get("policy")]:
            graph["policy"] = node("FasterCachePolicyLoad", filename=graph[name]["inputs"]["policy"])
            graph[name]["inputs"]["policy"] = ["policy", 0]
        return graph

    def learn(self, method: str, budget: float, steps: int, cfg: float = 4.5) -> str:
        """Find a policy on tuning prompts and save it; returns the file's name."""
        name = f"{method} {steps} {budget:g}".replace(" ", "_")
        graph = self.bed.graph(self.bed.prompts("tuning")[:LEARNT])
        graph["find"] = node(
            "FasterCacheAutoFR",
            model=["load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=SEED,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler=self.bed.scheduler,
            denoise=1.0,
            budget=budget,
            method=method,
            pictures=LEARNT,
        )
        graph["save"] = node("FasterCachePolicySave", policy=["find", 0], filename=name)
        self.host.run(graph)
        return f"{name}.json"


def frdiff(name: str, **inputs: Any) -> Run:
    """A run of FasterCacheFRDiff."""
    return Run(name, (("FasterCacheFRDiff", inputs),))


def runs_at(bench: PolicyBench, steps: int) -> list[Run]:
    """Every run at a number of steps, with policies found for them."""
    published = [
        frdiff(f"1 in {every}, {mixing}", interval=every, score_mixing=mixing)
        for every in (2, 3)
        for mixing in ("paper", "scores", "features")
    ]
    searched = [
        frdiff(f"{method} {budget:g}", policy=bench.learn(method, budget, steps))
        for method, budgets in BUDGETS.items()
        for budget in budgets
    ]
    return [*published, *searched]


def measure(
    bench: PolicyBench, steps: int, batches: Sequence[Sequence[str]], converged: list[Result]
) -> dict[str, Any]:
    """{"steps", "runs": [...]} of one number of steps. converged: results of CONVERGED, one a batch."""
    full, *runs = (replace(run, steps=steps) for run in (Run("full"), *runs_at(bench, steps)))
    cost = costs(bench, full, runs, batches[0][:1])
    results = {"converged": converged}
    with tqdm(unit="run", disable=None) as bar:
        for i, batch in enumerate(batches):
            turn = [full, *rotated(runs + plain_runs(cost, steps), i / len(batches))]
            for name, result in sample_each(bench, turn, batch, SEED + i, bar):
                results.setdefault(name, []).append(result)
    side_by_side(results, cost, steps, batches[0]).save(OUTPUT / f"{bench.bed.model}_{steps}.jpg", quality=92)
    return {"steps": steps, "runs": [described(name, results, cost, steps) for name in results]}


def side_by_side(results: Results, cost: Mapping[str, float], steps: int, prompts: Sequence[str]) -> Image.Image:
    """Pictures of the runs SHOWN, each policy followed by the fewer steps at its cost; of clips the last frame."""
    columns = {}
    for name in SHOWN:
        columns[name] = results[name][0].pictures
        if name.startswith("exact"):
            plain = f"{plain_steps(cost[name], steps)} steps"
            columns[plain] = results[plain][0].pictures
    return sheet({name: shown[:, -shown.shape[2] :] for name, shown in columns.items()}, prompts, len(prompts))


def costs(bench: Bench, full: Run, runs: Sequence[Run], prompts: Sequence[str]) -> dict[str, float]:
    """{run name: cost}, counted in FLOPs: a row with features from the cache is cheaper than a computed one."""
    whole = bench.count_flops(full, prompts)
    return {run.name: bench.count_flops(run, prompts) / whole for run in runs}


def plain_runs(cost: Mapping[str, float], steps: int) -> list[Run]:
    """Plain Euler, beside some runs also dpmpp_2m, at the fewest steps that are not cheaper than each run."""
    counts = sorted({plain_steps(c, steps) for c in cost.values()} - {steps})
    second = sorted({plain_steps(cost[name], steps) for name in BESIDE_SECOND_ORDER})
    return [
        *(Run(f"{count} steps", steps=count) for count in counts),
        *(Run(f"{count} dpmpp_2m", steps=count, sampler="dpmpp_2m") for count in second),
    ]


def described(name: str, results: Results, cost: Mapping[str, float], steps: int) -> dict[str, Any]:
    """One run: its cost, and how near it is to full sampling and to the converged solution."""
    price = cost[name] if name in cost else 1.0 if name in FIXED else int(name.split()[0]) / steps
    entry = {
        "name": name,
        "cost": price,
        **mean_and_std("psnr", psnr(results, name)),
        **mean_and_std("converged", psnr(results, name, "converged")),
        "report": results[name][0].report,
    }
    if name in cost:
        plain = plain_steps(cost[name], steps)
        entry |= gain_over(results, name, "full" if plain == steps else f"{plain} steps")
    return entry


def table(at_steps: Mapping[str, Any]) -> str:
    """One number of steps for a person."""
    lines = [
        "",
        f"{at_steps['steps']} steps",
        "run                      cost   PSNR to full    gain over fewer steps   PSNR to the converged",
    ]
    for run in at_steps["runs"]:
        gain = as_text(run, "gain") if "gain" in run else ""
        lines.append(
            f"{run['name']:<24} {run['cost']:5.3f}  {as_text(run, 'psnr'):<15} {gain:<23} {as_text(run, 'converged')}"
        )
    return "\n".join(lines)


def by_sampler(bench: Bench, prompts: Sequence[str]) -> dict[str, Any]:
    """{sampler: what FRDiff did there, how near to full sampling with it, and how near fewer steps are}."""
    samplers = bench.host.object_info("KSampler")["input"]["required"]["sampler_name"][0]
    reuse, rows = reuse_cost(bench, prompts[:1]), {}
    for sampler in tqdm([name for name in samplers if not name.endswith("_gpu")], disable=None):
        rows[sampler] = row = with_sampler(bench, prompts, sampler, reuse)
        print(
            f"{sampler:<32} {row['cost']:.2f}  {as_text(row, 'psnr'):<14} {row['steps']:>2} steps "
            f"{as_text(row, 'fewer'):<14} {row['evaluations']}",
            flush=True,
        )
    return rows


def reuse_cost(bench: Bench, prompts: Sequence[str]) -> float:
    """FLOPs of a row with features from the cache over those of a computed one."""
    run = frdiff("features", score_mixing="features")
    full, ours = (bench.count_flops(replace(r, steps=4), prompts) for r in (Run("full"), run))
    return (ours / full - 3 / 4) * 4  # of four steps the second is reused


def with_sampler(bench: Bench, prompts: Sequence[str], sampler: str, reuse: float) -> dict[str, Any]:
    """One sampler: what FRDiff as published does, how near that comes, and how near fewer steps come."""

    def at(run: Run, steps: int = SAMPLER_STEPS) -> Result:
        return bench.sample(replace(run, steps=steps, sampler=sampler), prompts)

    full, ours = at(Run("full")), at(frdiff("paper", score_mixing="paper"))
    report = ours.report or {}
    actions = report["totals"]["evaluations"]
    costs = {"computed": 1.0, "predicted": 0.0}  # all others take features from the cache
    cost = sum(n * costs.get(action, reuse) for action, n in actions.items()) / sum(actions.values())
    steps = plain_steps(cost, SAMPLER_STEPS)
    results = {"full": [full], "ours": [ours], "fewer": [at(Run("fewer"), steps)]}
    return {
        "cost": cost,
        "steps": steps,
        "evaluations": actions,
        "notes": report["notes"],
        **mean_and_std("psnr", psnr(results, "ours")),
        **mean_and_std("fewer", psnr(results, "fewer")),
    }


def chosen() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="dev.py bench frdiff")
    parser.add_argument("--bed", choices=list(BEDS), default="mmdit", help="the model")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of steps")
    parser.add_argument("--samplers", action="store_true", help="sampler by sampler instead")
    parser.add_argument("--pictures", type=int, default=16, help="at most so many prompts")
    return parser.parse_args()


def by_steps(bench: PolicyBench, prompts: Sequence[str], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Part 1 at every number of steps, each table printed as soon as it is there."""
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    converged = [bench.sample(CONVERGED, batch, SEED + i) for i, batch in enumerate(batches)]
    tables = []
    for count in steps:
        tables.append(measure(bench, count, batches, converged))
        print(table(tables[-1]), flush=True)
    return tables


def main() -> None:
    """Measure one bed."""
    options = chosen()
    prompts = BEDS[options.bed].prompts("report")[: options.pictures]
    path = OUTPUT / f"{options.bed}{'_samplers' if options.samplers else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Host(threads=2) as host:
        bench = PolicyBench(host, options.bed)
        rows: Any = (
            by_sampler(bench, prompts[:SAMPLER_PICTURES])
            if options.samplers
            else by_steps(bench, prompts, options.steps)
        )
    path.write_text(json.dumps(rows, indent=1))
    print(f"\n{path}")


if __name__ == "__main__":
    with plain_errors():
        main()
