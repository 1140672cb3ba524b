"""What a patched model does: its controller, and how each signal and feature is carried forward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from . import messages
from .controllers.interval import IntervalSettings
from .controllers.planned import PolicySettings
from .controllers.together import TogetherSettings
from .features.reuse import ReuseSettings
from .protocols import ControllerSettings
from .signal import DifferenceSettings, OutputSettings

# What a node may speak of, in the words of notes.
STEPS, GUIDANCE, FEATURES = "predicted steps", "CFG-Cache", "feature reuse"
PARTS = (STEPS, GUIDANCE, FEATURES)


@dataclass(frozen=True)
class CacheSettings:
    """label: names the choice in reports; controller: decides what every evaluation does.

    difference: how branches are estimated from the conditional one (CFG-Cache); output: how the conditional output is
    predicted; reuse: which features are reused. None turns each of them off. learn: sample in full as well, and learn
    what errors mean on this model. found: follow a policy that was found for exactly this run, if there is one.
    guided: how CFG-Cache estimates beside predicted steps, where another node says it; None for as `difference` does.
    node: what says so; owners: (part, node) where several do; notes: what of them is left out.
    """

    label: str
    controller: ControllerSettings = field(default_factory=IntervalSettings)
    difference: DifferenceSettings | None = None
    output: OutputSettings | None = None
    reuse: ReuseSettings | None = None
    learn: bool = False
    found: bool = False
    guided: DifferenceSettings | None = None
    node: str = "another node"
    owners: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_policy(self) -> bool:
        """True where one plan says all of every step: nothing of it can be left to others but its features."""
        return isinstance(self.controller, PolicySettings)

    @property
    def steps(self) -> ControllerSettings | None:
        """What decides which evaluations are predicted, None where none is."""
        if isinstance(self.controller, TogetherSettings):
            return self.controller.steps
        return None if isinstance(self.controller, IntervalSettings) and self.output is None else self.controller

    @property
    def guidance(self) -> IntervalSettings | None:
        """What decides where the negative pass alone is skipped, None where nothing does."""
        if isinstance(self.controller, TogetherSettings):
            return self.controller.guidance
        own = isinstance(self.controller, IntervalSettings) and self.controller.estimate is not None
        return self.controller if own else None  # type: ignore[return-value]

    @property
    def guides(self) -> DifferenceSettings | None:
        """How CFG-Cache estimates."""
        return self.guided or self.difference

    @property
    def parts(self) -> dict[str, str]:
        """{part of the work that is spoken of: the node that does}."""
        spoken = {
            STEPS: self.steps is not None,
            GUIDANCE: self.guidance is not None or self.is_policy,
            FEATURES: self.reuse is not None,
        }
        return {part: dict(self.owners).get(part, f"{self.node} ({self.label})") for part in PARTS if spoken[part]}

    def with_steps(self, steps: ControllerSettings) -> CacheSettings:
        """The same with other settings in the place of those that predict steps."""
        together = isinstance(self.controller, TogetherSettings)
        return replace(self, controller=replace(self.controller, steps=steps) if together else steps)  # type: ignore


def combined(earlier: CacheSettings, later: CacheSettings) -> CacheSettings:
    """What two nodes on one model say together: each gives its part, and of what both speak of the later one's counts.

    A policy says all of every step, so that it gives way, or takes the place of the other, as a whole.
    """
    before, now = earlier.parts, later.parts
    clash = [part for part in PARTS if part in before and part in now]
    notes = tuple(messages.one_says(part, now[part], before[part]) for part in clash)
    notes = (*earlier.notes, *later.notes, *dict.fromkeys(notes))
    if later.is_policy or (earlier.is_policy and clash and clash != [FEATURES]):
        left = tuple(messages.left_out(part, before[part], later.node) for part in before if part not in clash)
        return replace(later, notes=(*notes, *left)) if before else later
    by = {part: later if part in now else earlier for part in PARTS}
    owners = {**before, **now}
    steps, guidance, alone = by[STEPS].steps, by[GUIDANCE].guidance, len({*owners.values()}) == 1
    if by[STEPS].learn and not alone:
        notes = (*notes, messages.LEARNS_ALONE)
    labels = dict.fromkeys(source.label for source in (earlier, later) if source in [by[part] for part in owners])
    return CacheSettings(
        " + ".join(labels) or later.label,
        together(steps, guidance),
        by[STEPS if steps else GUIDANCE].difference,
        by[STEPS].output,
        by[FEATURES].reuse,
        by[STEPS].learn and alone,
        by[STEPS].found and alone,
        by[GUIDANCE].guides if steps and guidance else None,
        later.node,
        tuple(owners.items()),
        notes,
    )


def together(steps: ControllerSettings | None, guidance: IntervalSettings | None) -> ControllerSettings:
    """One controller of what predicts steps and of CFG-Cache, each None where it is not there."""
    if steps and guidance:
        return TogetherSettings(steps, guidance)
    return steps or guidance or IntervalSettings()
