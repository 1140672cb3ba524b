"""What a patched model does: which methods are on, each with its own settings."""
from dataclasses import dataclass

from .guidance import GuidanceSettings
from .jump import JumpSettings
from .reuse import ReuseSettings


@dataclass(frozen=True)
class CacheSettings:
    """The methods of one run; None turns a method off. `label` names the choice in reports."""
    label: str
    guidance: GuidanceSettings | None = None
    reuse: ReuseSettings | None = None
    jump: JumpSettings | None = None
