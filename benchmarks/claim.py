"""When the difference between the branches changes more slowly than the branches, and what that gains.

Records full sampling of the tuning prompts and asks of every evaluation, in the network's output space:
how far cond, uncond and their difference moved since the evaluation before, how large the difference
is, in which frequencies, and what an estimated difference would do to the latent. Then samples
fixed schedules, the paper's among them, at more and more steps, each beside plain fewer steps.
Writes docs/images/cfg_difference_BED.png and output/claim/BED.json and prints the figures.
`--bed` chooses the model: mmdit (default), unet or wan.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from benchmarks.tools.comparison import equal_steps, sample_each
from benchmarks.tools.decibels import gain_over
from benchmarks.tools.figures import plt, save
from benchmarks.tools.intervals import COLOURS, FORECASTS, SETTINGS, cfg_cache
from benchmarks.tools.recording import Recording, load_model, record
from benchmarks.tools.sampling import SEED, Bench, Run, chosen_bed
from fastercache_core.bands import split
from fastercache_core.forecast import make_forecaster
from fastercache_core.signal import rms
from testbed.beds import BEDS
from testbed.server import ROOT, Host, plain_errors

SHOWN = ("hold", "linear", "fitted")
RADIUS = (0.2,)
PROMPTS, FEW = 16, 8  # recorded; sampled with the paper's schedule
STEPS = (30, 60, 120)
SCHEDULES = [
    ("1 in 5", 5, 1 / 3, "o-", FORECASTS),
    ("1 in 5, last third", 5, 2 / 3, "^:", ("hold", "fitted")),
    ("1 in 2", 2, 1 / 3, "s--", SHOWN),
]  # name, interval, start, line, forecasts
IMAGES, OUTPUT = ROOT / "docs" / "images", ROOT / "output" / "claim"


def sizes(x: Tensor) -> Tensor:
    """Root mean square of every evaluation and picture, [evaluations, batch]."""
    return torch.stack([rms(value) for value in x])


def changes(x: Tensor) -> Tensor:
    """The same of what changed since the evaluation before, [evaluations - 1, batch]."""
    return sizes(x[1:] - x[:-1])


def movement(recording: Recording) -> dict[str, list[float]]:
    """{name: [evaluations]}: sizes and changes relative to the size of cond, mean over the pictures."""
    size = sizes(recording.cond)
    low, high = split(recording.difference, RADIUS)
    parts = {"difference": recording.difference, "low": low, "high": high}
    moving = {"cond": recording.cond, "uncond": recording.uncond, **parts}
    measures = {f"{name}_change": changes(x) / size[1:] for name, x in moving.items()}
    measures |= {f"{name}_size": sizes(x) / size for name, x in parts.items()}
    measures["low_share"] = sizes(low) ** 2 / sizes(recording.difference) ** 2
    return {name: x.mean(1).tolist() for name, x in measures.items()}


def claims(recording: Recording) -> dict[str, float]:
    """On which share of evaluations (and pictures) the claim holds, in three readings."""
    difference = changes(recording.difference)

    def share(smaller: Tensor, larger: Tensor) -> float:
        return float((smaller < larger).float().mean())

    return {
        "moves less than cond": share(difference, changes(recording.cond)),
        "moves less than uncond": share(difference, changes(recording.uncond)),
        "is smaller than uncond's move": share(sizes(recording.difference)[1:], changes(recording.uncond)),
    }


def estimates(recording: Recording, forecast: str, every: int, first: int = 0) -> dict[int, Tensor]:
    """Errors of the estimated difference at a fixed interval: {evaluation: error [batch, ...]}.

    first: an evaluation that is computed; earlier ones are computed as well.
    """
    forecaster, errors = make_forecaster(forecast, RADIUS), {}
    for e, (sigma, true) in enumerate(zip(recording.sigmas, recording.difference)):
        if e > first and (e - first) % every and len(forecaster.nodes) == forecaster.depth:
            errors[e] = forecaster.predict(sigma) - true
        else:
            forecaster.observe(sigma, true)
    return errors


def effect(recording: Recording, cfg: float, evaluation: int, error: Tensor) -> Tensor:
    """What one error of the difference does to the latent, relative to its size: [batch, ...]."""
    step = recording.sigmas[evaluation] - recording.sigmas[evaluation + 1]
    return (cfg - 1) * step * error / per_picture(rms(recording.latent), error)


def per_picture(values: Tensor, like: Tensor) -> Tensor:
    """`values` [n] so that they multiply the first axis of a tensor of the shape of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def one_skip(recording: Recording, cfg: float, forecast: str, every: int, gap: int) -> list[tuple[int, float]]:
    """[(evaluation, effect)] of the estimate made `gap` evaluations after a computed one, mean of the pictures."""
    effects = {}
    for first in range(every):
        for e, error in estimates(recording, forecast, every, first).items():
            if (e - first) % every == gap:
                effects[e] = float(rms(effect(recording, cfg, e, error)).mean())
    return sorted(effects.items())


def whole_schedule(recording: Recording, cfg: float, forecast: str, every: int, start: float) -> dict[str, float]:
    """All skips of a schedule together, were each error simply added to the latent.

    sum: size of the added errors; parts: sum of their sizes. sum / parts is 1 when all push one way.
    """
    last = len(recording.cond) - 1
    first = max(round(start * len(recording.cond)) - 1, 0)
    errors = estimates(recording, forecast, every, first).items()
    effects = torch.stack([effect(recording, cfg, e, error) for e, error in errors if e != last])
    total, parts = rms(effects.sum(0)), sizes(effects).sum(0)
    return {
        "skips": len(effects),
        "sum": float(total.mean()),
        "parts": float(parts.mean()),
        "one way": float((total / parts).mean()),
    }


def balance(recording: Recording, cfg: float, start: float) -> float:
    """How much of the guided output's change along the path, from `start` on, is the scaled difference's.

    Holding the difference pays at one computed evaluation in n when this is below 1 / (n + 1).
    """
    guided = recording.cond - (cfg - 1) * recording.difference
    steps = per_picture(-torch.tensor(recording.sigmas).diff()[1:], guided)
    first = round(start * len(steps))

    def moved(x: Tensor) -> Tensor:
        return rms(((x[1:] - x[:-1]) * steps)[first:].sum(0)).mean()

    return float((cfg - 1) * moved(recording.difference) / moved(guided))


def analyse(recording: Recording, steps: int, cfg: float) -> dict[str, Any]:
    """All measures of one recorded setting."""
    skips = {
        f"{name}, {every} gap {gap}": one_skip(recording, cfg, name, every, gap)
        for name in SHOWN
        for every, gap in ((2, 1), (5, 1), (5, 4))
    }
    schedules = {
        f"{name}, every {every} from {start:.2f}": whole_schedule(recording, cfg, name, every, start)
        for name in SHOWN
        for every, start in ((2, 0.0), (2, 1 / 3), (5, 1 / 3))
    }
    balances = {f"from {start:.2f}": balance(recording, cfg, start) for start in (0.0, 1 / 3, 2 / 3)}
    return {
        "steps": steps,
        "cfg": cfg,
        "sigmas": recording.sigmas,
        "movement": movement(recording),
        "claims": claims(recording),
        "balance": balances,
        "skips": skips,
        "schedules": schedules,
    }


def schedule_runs() -> list[Run]:
    """Every fixed schedule as a run."""
    return [
        cfg_cache(f"{forecast}, {name}", FORECASTS[forecast], every, start)
        for name, every, start, _, forecasts in SCHEDULES
        for forecast in forecasts
    ]


def gained(bench: Bench, prompts: Sequence[str], steps: int) -> dict[str, dict[str, Any]]:
    """PSNR gained by every schedule over plain fewer steps, at one step count: {name: see gain_over}."""
    runs, bar = [replace(run, steps=steps) for run in (Run("full"), *schedule_runs())], tqdm(disable=True)
    one_batch = dict(sample_each(bench, runs, prompts, SEED, bar))
    plain = [Run(f"steps_{name}", steps=equal_steps(result.rows, len(prompts))) for name, result in one_batch.items()]
    one_batch |= dict(sample_each(bench, plain, prompts, SEED, bar))
    results = {name: [result] for name, result in one_batch.items()}
    return {run.name: gain_over(results, run.name, f"steps_{run.name}") for run in runs[1:]}


def draw(settings: Sequence[Mapping[str, Any]], gains: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """The figure of the docs."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.6), constrained_layout=True)
    shown = [
        (next(s for s in settings if (s["steps"], s["cfg"]) == (30, cfg)), line)
        for cfg, line in ((4.5, "-"), (9.0, "--"))
    ]
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


def label(name: str, line: str) -> str | None:
    """A legend entry for solid lines only: dashes are the same at cfg 9."""
    return name if line == "-" else None


def draw_changes(panel: Axes, setting: Mapping[str, Any], line: str) -> None:
    """How far branches and difference move in one step."""
    for name, colour in (("cond", "tab:gray"), ("uncond", "tab:brown"), ("difference", "tab:red")):
        values = setting["movement"][f"{name}_change"]
        panel.plot(range(1, len(values) + 1), values, line, color=colour, label=label(name, line))
    panel.set(
        title="A. Change in one step (30 steps; dashed: cfg 9)", yscale="log", xlabel="step", ylabel="relative to cond"
    )


def draw_bands(panel: Axes, setting: Mapping[str, Any], line: str) -> None:
    """The size of the difference by band."""
    for name, colour in (("low", "tab:blue"), ("high", "tab:orange")):
        panel.plot(setting["movement"][f"{name}_size"], line, color=colour, label=label(f"{name} frequencies", line))
    panel.set(title="B. Size of the difference", yscale="log", xlabel="step", ylabel="relative to cond")


def draw_skips(panel: Axes, setting: Mapping[str, Any]) -> None:
    """What one skipped pass does to the latent, by forecast."""
    for name in SHOWN:
        for every, gap, line in ((2, 1, "-"), (5, 4, ":")):
            panel.plot(
                *zip(*setting["skips"][f"{name}, {every} gap {gap}"]),
                line,
                color=COLOURS[name],
                label=f"{name}, step {gap} after a computed one",
            )
    panel.set(
        title="C. Effect of one skipped pass (cfg 4.5)",
        yscale="log",
        xlabel="step",
        ylabel="relative to the latent",
        ylim=(1e-3, 0.5),
    )


def draw_gains(panel: Axes, gains: Mapping[int, Mapping[str, Any]]) -> None:
    """What fixed schedules gain over fewer steps."""
    for name, _, _, line, forecasts in SCHEDULES:
        for forecast in forecasts:
            values = [of_steps[f"{forecast}, {name}"]["gain"] for of_steps in gains.values()]
            panel.plot(list(gains), values, line, color=COLOURS[forecast], label=f"{forecast}, {name}")
    panel.axhline(0, color="black", lw=1.5)
    panel.set(
        title="D. Gain over fewer steps (cfg 4.5)",
        xlabel="steps of full sampling",
        xscale="log",
        ylabel="dB (below 0: fewer steps is better)",
    )
    panel.set_xticks(list(gains), list(map(str, gains)))
    panel.minorticks_off()


def text(setting: Mapping[str, Any]) -> str:
    """One recorded setting for a person."""
    lines = ["", f"{setting['steps']} steps, cfg {setting['cfg']}"]
    lines += [f"  difference {name:<32} {share:.0%}" for name, share in setting["claims"].items()]
    lines += [
        f"  {name:<30} {s['skips']:>3} skips, sum {s['sum']:.4f}, one way {s['one way']:.2f}"
        for name, s in setting["schedules"].items()
    ]
    lines += [
        f"  its share in the guided output's change, {name:<9} {share:.2f}"
        for name, share in setting["balance"].items()
    ]
    return "\n".join(lines)


def recorded(bed: str, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The analysis of every setting."""
    model, settings = load_model(bed), []
    for steps, cfg in SETTINGS:
        settings.append(analyse(record(model, prompts, steps, cfg, SEED, bed), steps, cfg))
        print(text(settings[-1]), flush=True)
    return settings


def sampled(bed: str, prompts: Sequence[str]) -> dict[int, dict[str, Any]]:
    """{steps: what fixed schedules gain there}."""
    gains = {}
    with Host(threads=2) as host:
        for steps in STEPS:
            gains[steps] = gained(Bench(host, bed), prompts, steps)
            print(f"\n{steps} steps: gain over fewer steps, dB")
            print(
                "\n".join(f"  {name:<30} {g['gain']:+.1f} +- {g['gain_std']:.1f}" for name, g in gains[steps].items()),
                flush=True,
            )
    return gains


def main() -> None:
    """Run everything and write it down."""
    bed = chosen_bed("dev.py bench claim")
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
