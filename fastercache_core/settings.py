"""What a patched model does: its controller, and how each signal and feature is carried forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from .controllers.interval import IntervalSettings
from .features.reuse import ReuseSettings
from .protocols import ControllerSettings
from .signal import DifferenceSettings, OutputSettings


@dataclass(frozen=True)
class CacheSettings:
    """label: names the choice in reports; controller: decides what every evaluation does.

    difference: how branches are estimated from the conditional one (CFG-Cache); output: how the conditional output is
    predicted; reuse: which features are reused. None turns each of them off. learn: sample in full as well, and learn
    what errors mean on this model. found: follow a policy that was found for exactly this run, if there is one.
    """

    label: str
    controller: ControllerSettings = field(default_factory=IntervalSettings)
    difference: DifferenceSettings | None = None
    output: OutputSettings | None = None
    reuse: ReuseSettings | None = None
    learn: bool = False
    found: bool = False
