"""What a patched model does: which methods are on, each with its own settings."""
from dataclasses import dataclass

from .gate import GateSettings
from .guidance import GuidanceSettings
from .jump import JumpSettings
from .reuse import ReuseSettings


@dataclass(frozen=True)
class CacheSettings:
    """The methods of one run; None turns a method off. `label` names the choice in reports.

    gate: lets `guidance` and `jump` begin only when their forecasts are good enough.
    """
    label: str
    guidance: GuidanceSettings | None = None
    reuse: ReuseSettings | None = None
    jump: JumpSettings | None = None
    gate: GateSettings | None = None
