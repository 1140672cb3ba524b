"""When the difference between the branches changes more slowly than the branches, and what that is worth.

Records full sampling of the tuning prompts and asks of every evaluation, in the network's output space:
how far cond, uncond and their difference moved since the evaluation before, how large the difference
is, in which frequencies, and what an estimated difference would have done to the latent. Then samples
fixed schedules, the paper's among them, at more and more steps, each beside plain fewer steps.
Writes docs/images/cfg_difference_BED.png and output/claim/BED.json and prints the numbers.
`--bed` chooses the model: mmdit (default), unet or wan.
"""
import json
from dataclasses import replace

import matplotlib
import torch
from benchmarks.cfg_cache import COLOURS, FORECASTS, against, cfg_cache, chosen_bed, save
from benchmarks.tools.comparison import equal_steps, sample_each
from benchmarks.tools.recording import load_model, record
from benchmarks.tools.sampling import SEED, Bench, Run
from fastercache_core.bands import split
from fastercache_core.gate import rms
from fastercache_core.measured import make_history
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SETTINGS = [(30, 4.5), (50, 4.5), (30, 9.0), (50, 9.0)]
SHOWN = ("hold", "linear", "measured")
RADIUS = (0.2,)
PROMPTS, FEW = 16, 8            # recorded; sampled with the paper's schedule
STEPS = (30, 60, 120)
SCHEDULES = [("1 in 5", 5, 1 / 3, "o-", FORECASTS), ("1 in 5, last third", 5, 2 / 3, "^:", ("hold", "measured")),
             ("1 in 2", 2, 1 / 3, "s--", SHOWN)]  # name, interval, start, line, forecasts
IMAGES, OUTPUT = ROOT / "docs" / "images", ROOT / "output" / "claim"


def sizes(x):
    """Root mean square of every evaluation and picture, [evaluations, batch]."""
    return torch.stack([rms(value) for value in x])


def changes(x):
    """The same of what changed since the evaluation before, [evaluations - 1, batch]."""
    return sizes(x[1:] - x[:-1])


def movement(recording):
    """{name: [evaluations]}: sizes and changes relative to the size of cond, mean over the pictures."""
    size = sizes(recording.cond)
    low, high = split(recording.difference, RADIUS)
    parts = {"difference": recording.difference, "low": low, "high": high}
    moving = {"cond": recording.cond, "uncond": recording.uncond, **parts}
    found = {f"{name}_change": changes(x) / size[1:] for name, x in moving.items()}
    found |= {f"{name}_size": sizes(x) / size for name, x in parts.items()}
    found["low_share"] = sizes(low) ** 2 / sizes(recording.difference) ** 2
    return {name: x.mean(1).tolist() for name, x in found.items()}


def claims(recording):
    """On which share of evaluations (and pictures) the claim holds, in three readings."""
    difference = changes(recording.difference)
    share = lambda smaller, larger: float((smaller < larger).float().mean())
    return {"moves less than cond": share(difference, changes(recording.cond)),
            "moves less than uncond": share(difference, changes(recording.uncond)),
            "is smaller than uncond's move": share(sizes(recording.difference)[1:], changes(recording.uncond))}


def estimates(recording, forecast, every, first=0):
    """Errors of the estimated difference at a fixed interval: {evaluation: error [batch, ...]}.

    first: an evaluation that is computed; earlier ones are computed as well.
    """
    history, errors = make_history(forecast), {}
    for e, (sigma, true) in enumerate(zip(recording.sigmas, recording.difference)):
        if e > first and (e - first) % every and history.ready:
            errors[e] = history.at(sigma) - true
        else:
            history.push(sigma, split(true, RADIUS))
    return errors


def effect(recording, cfg, evaluation, error):
    """What one error of the difference does to the latent: a tensor relative to its size, [batch, ...]."""
    step = recording.sigmas[evaluation] - recording.sigmas[evaluation + 1]
    return (cfg - 1) * step * error / each(rms(recording.latent), error)


def each(numbers, like):
    """One number for each of the first axis, to multiply with a tensor of the shape of `like`."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def one_skip(recording, cfg, forecast, every, gap):
    """[(evaluation, effect)] of the estimate made `gap` evaluations after a computed one, mean of the pictures."""
    found = {}
    for first in range(every):
        for e, error in estimates(recording, forecast, every, first).items():
            if (e - first) % every == gap:
                found[e] = float(rms(effect(recording, cfg, e, error)).mean())
    return sorted(found.items())


def whole_schedule(recording, cfg, forecast, every, start):
    """All skips of a schedule together, were each error simply added to the latent.

    sum: size of the added errors; parts: sum of their sizes. sum / parts is 1 when all push one way.
    """
    last = len(recording.cond) - 1
    first = max(round(start * len(recording.cond)) - 1, 0)
    effects = [effect(recording, cfg, e, error)
               for e, error in estimates(recording, forecast, every, first).items() if e != last]
    total, parts = rms(sum(effects)), sum(rms(e) for e in effects)
    return {"skips": len(effects), "sum": float(total.mean()), "parts": float(parts.mean()),
            "one way": float((total / parts).mean())}


def balance(recording, cfg, start):
    """How much of the guided output's change along the path, from `start` on, is the scaled difference's.

    Holding the difference is worth its cost at one full evaluation in n when this is below 1 / (n + 1).
    """
    guided = recording.cond - (cfg - 1) * recording.difference
    steps = each(-torch.tensor(recording.sigmas).diff()[1:], guided)
    first = round(start * len(steps))
    moved = lambda x: rms(((x[1:] - x[:-1]) * steps)[first:].sum(0)).mean()
    return float((cfg - 1) * moved(recording.difference) / moved(guided))


def analyse(recording, steps, cfg):
    """Everything that one recorded setting has to say."""
    skips = {f"{name}, {every} gap {gap}": one_skip(recording, cfg, name, every, gap)
             for name in SHOWN for every, gap in ((2, 1), (5, 1), (5, 4))}
    schedules = {f"{name}, every {every} from {start:.2f}": whole_schedule(recording, cfg, name, every, start)
                 for name in SHOWN for every, start in ((2, 0.0), (2, 1 / 3), (5, 1 / 3))}
    balances = {f"from {start:.2f}": balance(recording, cfg, start) for start in (0.0, 1 / 3, 2 / 3)}
    return {"steps": steps, "cfg": cfg, "sigmas": recording.sigmas, "movement": movement(recording),
            "claims": claims(recording), "balance": balances, "skips": skips, "schedules": schedules}


def ways():
    """Every fixed schedule as a run."""
    return [cfg_cache(f"{forecast}, {name}", FORECASTS[forecast], every, start)
            for name, every, start, _, forecasts in SCHEDULES for forecast in forecasts]


def gained(bench, prompts, steps):
    """PSNR gained by every schedule over plain fewer steps, at one step count: {name: numbers}."""
    runs = [replace(run, steps=steps) for run in (Run("full"), *ways())]
    results = dict(sample_each(bench, runs, prompts, SEED, Silent()))
    plain = [Run(f"steps_{name}", steps=equal_steps(result.rows, len(prompts)))
             for name, result in results.items()]
    results |= dict(sample_each(bench, plain, prompts, SEED, Silent()))
    results = {name: [result] for name, result in results.items()}
    return {run.name: against(results, run.name, f"steps_{run.name}", "gain") for run in runs[1:]}


class Silent:
    """A progress bar that shows nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def draw(settings, gains, path):
    """The figure of the docs."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.6), constrained_layout=True)
    shown = [(next(s for s in settings if (s["steps"], s["cfg"]) == (30, cfg)), line)
             for cfg, line in ((4.5, "-"), (9.0, "--"))]
    for setting, line in shown:
        draw_changes(panels[0, 0], setting, line)
        draw_bands(panels[0, 1], setting, line)
    draw_skips(panels[1, 0], shown[0][0])
    draw_gains(panels[1, 1], gains)
    for panel in panels.flat:
        panel.grid(alpha=0.3, which="both")
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
    for panel in (*panels[0], panels[1, 0]):
        panel.legend(fontsize=8)
    panels[1, 1].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def label(name, line):
    """A legend entry for solid lines only: dashes are the same at cfg 9."""
    return name if line == "-" else None


def draw_changes(panel, setting, line):
    """How far branches and difference move in one step."""
    for name, colour in (("cond", "tab:gray"), ("uncond", "tab:brown"), ("difference", "tab:red")):
        values = setting["movement"][f"{name}_change"]
        panel.plot(range(1, len(values) + 1), values, line, color=colour, label=label(name, line))
    panel.set(title="A. Change in one step (30 steps; dashed: cfg 9)", yscale="log", xlabel="step",
              ylabel="relative to cond")


def draw_bands(panel, setting, line):
    """The size of the difference by band."""
    for name, colour in (("low", "tab:blue"), ("high", "tab:orange")):
        panel.plot(setting["movement"][f"{name}_size"], line, color=colour, label=label(f"{name} frequencies", line))
    panel.set(title="B. Size of the difference", yscale="log", xlabel="step", ylabel="relative to cond")


def draw_skips(panel, setting):
    """What one skipped pass does to the latent, by forecast."""
    for name in SHOWN:
        for every, gap, line in ((2, 1, "-"), (5, 4, ":")):
            panel.plot(*zip(*setting["skips"][f"{name}, {every} gap {gap}"]), line, color=COLOURS[name],
                       label=f"{name}, step {gap} after a full one")
    panel.set(title="C. Effect of one skipped pass (cfg 4.5)", yscale="log", xlabel="step",
              ylabel="relative to the latent", ylim=(1e-3, 0.5))


def draw_gains(panel, gains):
    """What fixed schedules gain over fewer steps."""
    for name, _, _, line, forecasts in SCHEDULES:
        for forecast in forecasts:
            values = [numbers[f"{forecast}, {name}"]["gain"] for numbers in gains.values()]
            panel.plot([int(steps) for steps in gains], values, line, color=COLOURS[forecast],
                       label=f"{forecast}, {name}")
    panel.axhline(0, color="black", lw=1.5)
    panel.set(title="D. Gain over fewer steps (cfg 4.5)", xlabel="steps of full sampling", xscale="log",
              ylabel="dB (below 0: fewer steps is better)")
    panel.set_xticks([int(steps) for steps in gains], list(gains))
    panel.minorticks_off()


def text(setting):
    """One recorded setting for a person."""
    lines = ["", f"{setting['steps']} steps, cfg {setting['cfg']}"]
    lines += [f"  difference {name:<32} {share:.0%}" for name, share in setting["claims"].items()]
    lines += [f"  {name:<30} {s['skips']:>3} skips, sum {s['sum']:.4f}, one way {s['one way']:.2f}"
              for name, s in setting["schedules"].items()]
    lines += [f"  its share in the guided output's change, {name:<9} {share:.2f}"
              for name, share in setting["balance"].items()]
    return "\n".join(lines)


def recorded(bed, prompts):
    """The analysis of every setting."""
    model, settings = load_model(bed), []
    for steps, cfg in SETTINGS:
        settings.append(analyse(record(model, prompts, steps, cfg, SEED, bed), steps, cfg))
        print(text(settings[-1]), flush=True)
    return settings


def sampled(bed, prompts):
    """{steps: what fixed schedules gain there}."""
    gains = {}
    with Host(threads=2) as host:
        for steps in STEPS:
            gains[steps] = gained(Bench(host, bed), prompts, steps)
            print(f"\n{steps} steps: gain over fewer steps, dB")
            print("\n".join(f"  {name:<30} {g['gain']:+.1f} +- {g['gain_std']:.1f}"
                            for name, g in gains[steps].items()), flush=True)
    return gains


def main():
    """Run everything and write it down."""
    bed = chosen_bed()
    prompts = BEDS[bed].prompts("tuning")
    settings = recorded(bed, prompts[:PROMPTS])
    gains = sampled(bed, prompts[:FEW])
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / f"{bed}.json").write_text(json.dumps({"recorded": settings, "gains": gains}, indent=1))
    draw(settings, gains, IMAGES / f"cfg_difference_{bed}.png")
    print(f"\n{OUTPUT / bed}.json; figure: {IMAGES / f'cfg_difference_{bed}.png'}")


if __name__ == "__main__":
    with plain_errors():
        main()
