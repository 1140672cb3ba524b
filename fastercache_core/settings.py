"""What a patched model does: which methods are on, each with its own settings."""
from dataclasses import dataclass

from .auto import AutoSettings
from .gate import GateSettings
from .guidance import GuidanceSettings
from .jump import JumpSettings
from .mixing import MixSettings
from .policy import Policy
from .reuse import ReuseSettings


@dataclass(frozen=True)
class CacheSettings:
    """The methods of one run; None turns a method off. `label` names the choice in reports.

    gate: lets `guidance` and `jump` begin only when their forecasts are good enough. plan: says what
    every evaluation does, in place of the methods' own intervals and of the gate. auto: chooses the gap
    between computed evaluations while sampling, likewise.
    """
    label: str
    guidance: GuidanceSettings | None = None
    reuse: ReuseSettings | None = None
    jump: JumpSettings | None = None
    gate: GateSettings | None = None
    auto: AutoSettings | None = None
    plan: MixSettings | Policy | None = None
