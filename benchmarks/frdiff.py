"""FRDiff as published and as found by search, beside fewer steps and beside a second-order solver.

Part 1, per bed, at 30 and 50 Euler steps (`--steps`): FRDiff with one key step in 2 and in 3 (as published, scores
held throughout, features reused throughout) and the policies of FasterCacheAutoFR, found on tuning
prompts. Beside each run stand the fewest plain steps that cost no less in counted FLOPs, beside some
dpmpp_2m at that cost too; all of them also against the converged solution (dpmpp_2m at many steps).
Part 2 (`--samplers`): FRDiff with every sampler of the host, against full sampling with it.
Writes output/frdiff/BED.json and pictures side by side, and prints the tables. `--bed` chooses the model.
"""
import argparse
import json
import math
from dataclasses import replace

from benchmarks.cfg_cache import against, decibels, numbers, psnr
from benchmarks.features import count_flops
from benchmarks.tools.comparison import BATCH, rotated, sample_each
from benchmarks.tools.pictures import sheet
from benchmarks.tools.sampling import SEED, Bench, Run
from testbed.beds import BEDS, node
from testbed.server import ROOT, Host, plain_errors
from tqdm import tqdm

LEARNT = 8                  # prompts that Auto-FR learns from
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

    def workflow(self, run, prompts, seed):
        """The API-format graph of one run, with the policy's file."""
        graph = super().workflow(run, prompts, seed)
        for name in [name for name, n in graph.items() if n["inputs"].get("policy")]:
            graph["policy"] = node("FasterCachePolicyLoad", filename=graph[name]["inputs"]["policy"])
            graph[name]["inputs"]["policy"] = ["policy", 0]
        return graph

    def learn(self, method, budget, steps, cfg=4.5):
        """Find a policy on tuning prompts and save it; returns the file's name."""
        name = f"{method} {steps} {budget:g}".replace(" ", "_")
        graph = self.bed.graph(self.bed.prompts("tuning")[:LEARNT])
        graph["find"] = node("FasterCacheAutoFR", model=["load", 0], positive=["positive", 0], negative=["negative", 0],
                             latent_image=["empty", 0], seed=SEED, steps=steps, cfg=cfg, sampler_name="euler",
                             scheduler=self.bed.scheduler, denoise=1.0, budget=budget, method=method,
                             pictures=LEARNT)
        graph["save"] = node("FasterCachePolicySave", policy=["find", 0], filename=name)
        self.host.run(graph)
        return f"{name}.json"


def frdiff(name, **inputs):
    """A run of FasterCacheFRDiff."""
    return Run(name, (("FasterCacheFRDiff", inputs),))


def runs_at(bench, steps):
    """Every run at a number of steps, the policies found first."""
    published = [frdiff(f"1 in {every}, {mixing}", interval=every, score_mixing=mixing)
                 for every in (2, 3) for mixing in ("paper", "scores", "features")]
    found = [frdiff(f"{method} {budget:g}", policy=bench.learn(method, budget, steps))
             for method, budgets in BUDGETS.items() for budget in budgets]
    return [*published, *found]


def measure(bench, steps, batches, converged):
    """{"steps", "runs": [...]} of one number of steps. converged: results of CONVERGED, one a batch."""
    full, *runs = (replace(run, steps=steps) for run in (Run("full"), *runs_at(bench, steps)))
    cost = costs(bench, full, runs, batches[0][:1])
    results = {"converged": converged}
    with tqdm(unit="run", disable=None) as bar:
        for i, batch in enumerate(batches):
            ways = [full, *rotated(runs + plain_runs(cost, steps), i / len(batches))]
            for name, result in sample_each(bench, ways, batch, SEED + i, bar):
                results.setdefault(name, []).append(result)
    side_by_side(results, cost, steps, batches[0]).save(OUTPUT / f"{bench.bed.model}_{steps}.jpg", quality=92)
    return {"steps": steps, "runs": [described(name, results, cost, steps) for name in results]}


def side_by_side(results, cost, steps, prompts):
    """Pictures of the runs SHOWN, each policy followed by the fewer steps at its cost; of clips the last frame."""
    columns = {}
    for name in SHOWN:
        columns[name] = results[name][0].pictures
        if name.startswith("exact"):
            plain = f"{plain_steps(cost[name], steps)} steps"
            columns[plain] = results[plain][0].pictures
    return sheet({name: shown[:, -shown.shape[2]:] for name, shown in columns.items()}, prompts, len(prompts))


def costs(bench, full, runs, prompts):
    """{run name: cost}, counted in FLOPs: a row with features from the cache is cheaper than a full one."""
    whole = count_flops(bench, full, prompts, SEED)
    return {run.name: count_flops(bench, run, prompts, SEED) / whole for run in runs}


def plain_runs(cost, steps):
    """Plain Euler, beside some runs also dpmpp_2m, at the fewest steps that are not cheaper than each run."""
    counts = sorted({plain_steps(c, steps) for c in cost.values()} - {steps})
    second = sorted({plain_steps(cost[name], steps) for name in BESIDE_SECOND_ORDER})
    return [*(Run(f"{count} steps", steps=count) for count in counts),
            *(Run(f"{count} dpmpp_2m", steps=count, sampler="dpmpp_2m") for count in second)]


def plain_steps(cost, steps):
    """The fewest plain steps that are not cheaper."""
    return math.ceil(cost * steps - 1e-3)


def described(name, results, cost, steps):
    """One run: its cost, and how near it is to full sampling and to the converged solution."""
    price = cost[name] if name in cost else 1.0 if name in FIXED else int(name.split()[0]) / steps
    other = {"full": results["converged"], "mine": results[name]}
    entry = {"name": name, "cost": price, **numbers("psnr", psnr(results, name)),
             **numbers("converged", psnr(other, "mine")), "report": results[name][0].report}
    if name in cost:
        plain = plain_steps(cost[name], steps)
        entry |= against(results, name, "full" if plain == steps else f"{plain} steps", "gain")
    return entry


def table(found):
    """One number of steps for a person."""
    lines = ["", f"{found['steps']} steps",
             "run                      cost   PSNR to full    gain over fewer steps   PSNR to the converged"]
    for run in found["runs"]:
        gain = decibels(run, "gain") if "gain" in run else ""
        lines.append(f"{run['name']:<24} {run['cost']:5.3f}  {decibels(run, 'psnr'):<15} {gain:<23} "
                     f"{decibels(run, 'converged')}")
    return "\n".join(lines)


def by_sampler(bench, prompts):
    """{sampler: what FRDiff did there, how near to full sampling with it, and how near fewer steps are}."""
    samplers = bench.host.object_info("KSampler")["input"]["required"]["sampler_name"][0]
    reuse, found = reuse_cost(bench, prompts[:1]), {}
    for sampler in tqdm([name for name in samplers if not name.endswith("_gpu")], disable=None):
        found[sampler] = one = with_sampler(bench, prompts, sampler, reuse)
        print(f"{sampler:<32} {one['cost']:.2f}  {decibels(one, 'psnr'):<14} {one['steps']:>2} steps "
              f"{decibels(one, 'fewer'):<14} {one['evaluations']}", flush=True)
    return found


def reuse_cost(bench, prompts):
    """FLOPs of a row with features from the cache over those of a full one."""
    run = frdiff("features", score_mixing="features")
    full, ours = (count_flops(bench, replace(r, steps=4), prompts, SEED) for r in (Run("full"), run))
    return (ours / full - 3 / 4) * 4  # of four steps the second is reused


def with_sampler(bench, prompts, sampler, reuse):
    """One sampler: what FRDiff as published does, how near that comes, and how near fewer steps come."""
    at = lambda run, steps=SAMPLER_STEPS: bench.sample(replace(run, steps=steps, sampler=sampler), prompts)
    full, ours = at(Run("full")), at(frdiff("paper", score_mixing="paper"))
    done = ours.report["totals"]["evaluations"]
    cost = sum(n * {"FULL": 1.0, "JUMP": 0.0}.get(action, reuse) for action, n in done.items()) / sum(done.values())
    steps = plain_steps(cost, SAMPLER_STEPS)
    results = {"full": [full], "ours": [ours], "fewer": [at(Run("fewer"), steps)]}
    return {"cost": cost, "steps": steps, "evaluations": done, "notes": ours.report["notes"],
            **numbers("psnr", psnr(results, "ours")), **numbers("fewer", psnr(results, "fewer"))}


def main():
    """Measure one bed."""
    parser = argparse.ArgumentParser(prog="dev.py bench frdiff")
    parser.add_argument("--bed", choices=list(BEDS), default="mmdit", help="the model")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of steps")
    parser.add_argument("--samplers", action="store_true", help="sampler by sampler instead")
    parser.add_argument("--pictures", type=int, default=16, help="at most so many prompts")
    chosen = parser.parse_args()
    prompts = BEDS[chosen.bed].prompts("report")[:chosen.pictures]
    batches = [prompts[i:i + BATCH] for i in range(0, len(prompts), BATCH)]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with Host(threads=2) as host:
        bench = PolicyBench(host, chosen.bed)
        if chosen.samplers:
            found, name = by_sampler(bench, prompts[:SAMPLER_PICTURES]), f"{chosen.bed}_samplers"
        else:
            found, name = [], chosen.bed
            converged = [bench.sample(CONVERGED, batch, SEED + i) for i, batch in enumerate(batches)]
            for steps in chosen.steps:
                found.append(measure(bench, steps, batches, converged))
                print(table(found[-1]), flush=True)
    (OUTPUT / f"{name}.json").write_text(json.dumps(found, indent=1))
    print(f"\n{OUTPUT / name}.json")


if __name__ == "__main__":
    with plain_errors():
        main()
