"""CFG-Cache at fixed intervals with no tolerance: runs of every forecast, the published ones among them."""

from collections.abc import Mapping
from typing import Any

from benchmarks.tools.sampling import Run

PUBLISHED = {
    "hold": {"forecast": "hold"},
    "paper": {"forecast": "hold", "weights": "paper"},
    "released": {"forecast": "hold", "weights": "released"},
}
FORECASTS = {**PUBLISHED, "linear": {"forecast": "linear"}, "fitted": {"forecast": "fitted"}}
COLOURS = {
    "fitted": "tab:purple",
    "linear": "tab:cyan",
    "hold": "tab:blue",
    "paper": "tab:orange",
    "released": "tab:red",
}
SETTINGS = [(30, 4.5), (50, 4.5), (30, 9.0), (50, 9.0)]  # steps and cfg


def cfg_cache(name: str, forecast: Mapping[str, Any], every: int, start: float = 0.0) -> Run:
    """A run of FasterCacheCFG that computes all branches once in `every` evaluations, from `start` on."""
    inputs = {**forecast, "interval": every, "tolerance": 0.0, "start_percent": start}
    return Run(name, (("FasterCacheCFG", inputs),))
