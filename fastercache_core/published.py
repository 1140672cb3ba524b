"""Published settings by name: what the papers' code does on each model, as data.

Step numbers there are absolute, for one number of steps. Here they are fractions of sampling, half a step before the
first step that is meant, so that with the published number of steps the same ones are met. Two things are not copied:
attention is reused only where the conditional branch runs alone, since in the published scripts it mixes the branches
elsewhere; and intervals count from the last computed step, not from the first step of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .clock import Interval, Window
from .controllers.interval import IntervalSettings
from .features.reuse import ReuseSettings
from .features.storage import StorageSettings
from .settings import CacheSettings
from .signal import DifferenceSettings

PAPER = "paper"  # the text's own settings, and what a model takes that no row is for


@dataclass(frozen=True)
class Published:
    """source: where it is from; families: of models that it is for, as in `families`; reuse: {kind of feature:
    Interval}, carried forward by `weight` with `w_first` to `w`; guidance: CFG-Cache's interval, None for none, and
    its `difference`."""

    source: str
    reuse: Mapping[str, Interval]
    weight: str = "hold"
    w_first: float = 0.0
    w: float = 0.5
    guidance: Interval | None = None
    difference: DifferenceSettings = field(default_factory=lambda: DifferenceSettings("hold"))
    families: tuple[str, ...] = ()


def attention(every: int, start: float) -> dict[str, Interval]:
    """Self-attention, over time as well, computed at one step in `every` from a part of sampling on."""
    return dict.fromkeys(("self", "temporal"), Interval(every, Window(start, 1.0)))


def skipped(every: int, start: float) -> Interval:
    """The negative pass at one step in `every` from a part of sampling on."""
    return Interval(every, Window(start, 1.0))


def compounding(
    low: float, low_end: float, high: float, high_start: float, low_start: float = 0.0, radius: float = 0.2
) -> DifferenceSettings:
    """Both bands of the difference compound by 1 + `low` and 1 + `high`, each in its own window."""
    low_window, high_window = Window(low_start, low_end), Window(high_start, 1.0)
    settings = DifferenceSettings("hold", "released", radius, alpha_low=low, alpha_high=high)
    return replace(settings, low_window=low_window, high_window=high_window)


def pyramid(start: float, end: float, **kinds: int) -> dict[str, Interval]:
    """PAB: each kind of attention at its own interval, in the middle of sampling."""
    return {kind: Interval(every, Window(start, end)) for kind, every in kinds.items()}


CODE = "Vchitect/FasterCache 02d05ef, scripts/"
PAB = "arXiv 2408.12588, VideoSys 4cce477, "
# fmt: off
PUBLISHED: dict[str, Published] = {
    PAPER: Published("arXiv 2410.19355, section 3", attention(2, 0.0), "ramp", 0.0, 1.0,
                     skipped(5, 1 / 3), DifferenceSettings("hold", "paper")),
    "CogVideoX": Published(CODE + "cogvideox, 50 steps", attention(3, 0.33), "constant", w=0.3,
                           guidance=skipped(5, 0.33), difference=compounding(0.1, 0.79, 0.1, 0.57),
                           families=("CogVideoX",)),
    "Open-Sora": Published(CODE + "opensora, 30 steps", attention(2, 0.217), "ramp", 0.045, 1.035,
                               skipped(5, 0.35), compounding(0.15, 0.817, 0.15, 0.617)),
    "Open-Sora-Plan": Published(CODE + "opensora_plan, 150 steps", attention(3, 0.29), "constant", w=0.3,
                                    guidance=skipped(6, 0.257), difference=compounding(0.1, 0.863, 0.2, 0.863)),
    "Latte": Published(CODE + "latte, 50 steps", attention(2, 0.29), "constant",
                       guidance=skipped(5, 0.33), difference=compounding(0.1, 0.87, 0.1, 0.87)),
    "Mochi": Published("Vchitect/FasterCache 02d05ef, genmo, 64 steps; w = max(0.5, step / 63) there",
                       attention(2, 0.305), "ramp", 0.5, 1.0, skipped(5, 0.336),
                       compounding(0.15, 0.789, 0.25, 0.461), families=("Mochi",)),
    "Vchitect": Published(CODE + "vchitect, 100 steps", attention(2, 0.295), guidance=skipped(5, 0.295),
                              difference=compounding(0.05, 0.785, 0.1, 0.595, radius=0.005)),
    "diffusers": Published("huggingface/diffusers 58eb52c, docs of FasterCacheConfig, CogVideoX-5b",
                           attention(2, 0.319), "constant", w=0.3, guidance=skipped(5, 0.219),
                           difference=compounding(0.1, 0.901, 0.1, 0.699, low_start=0.099)),
    "PAB Open-Sora": Published(PAB + "Open-Sora", pyramid(0.07, 0.55, self=2, temporal=4, cross=6)),
    "PAB Open-Sora-Plan": Published(PAB + "Open-Sora-Plan", pyramid(0.15, 0.9, self=2, temporal=4, cross=6)),
    "PAB Latte": Published(PAB + "Latte", pyramid(0.2, 0.9, self=2, temporal=3, cross=6)),
    "PAB Vchitect": Published(PAB + "Vchitect", pyramid(0.2, 0.9, self=2, temporal=4, cross=6)),
    "PAB CogVideoX": Published(PAB + "CogVideoX", pyramid(0.15, 0.9, self=2)),
    "Delta-DiT": Published("arXiv 2406.01125, PixArt, 20 steps: the rear until step 12, then the front",
                           {"rear": Interval(2, Window(0.0, 0.6)), "front": Interval(2, Window(0.6, 1.0))}),
}
# fmt: on
GUIDED = [name for name, row in PUBLISHED.items() if row.guidance]
RELEASED = [name for name in GUIDED if name != PAPER]


def row_for(family: str) -> str:
    """The name of the row that is for a family of models, the paper's own where there is none."""
    return next((name for name, row in PUBLISHED.items() if family in row.families), PAPER)


def published(name: str, span: Window, storage: StorageSettings = StorageSettings()) -> CacheSettings:
    """Everything of a row of PUBLISHED, inside a part of sampling."""
    row = PUBLISHED[name]
    intervals = {kind: within(interval, span) for kind, interval in row.reuse.items()}
    reuse = ReuseSettings(intervals, row.weight, row.w, storage, w_first=row.w_first)
    return replace(published_guidance(name, span), label=f"as published, {name}", reuse=reuse)


def published_guidance(name: str, span: Window) -> CacheSettings:
    """CFG-Cache of a row of PUBLISHED, inside a part of sampling."""
    row = PUBLISHED[name]
    estimate = row.guidance and within(row.guidance, span)
    difference = row.difference if estimate else None
    return CacheSettings(f"CFG-Cache as published, {name}", IntervalSettings(estimate=estimate), difference)


def within(interval: Interval, span: Window) -> Interval:
    """The interval inside a part of sampling as well as inside its own window."""
    start = max(interval.window.start, span.start)
    return replace(interval, window=Window(start, max(start, min(interval.window.end, span.end))))
