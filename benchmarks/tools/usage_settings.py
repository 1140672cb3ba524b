"""The settings that people run, with their weights, and the sigmas of a job under each of them. Data and arithmetic.

Weights are percent of the samplings of the official workflow templates, by their published usage (October 2026). Of
the last 11% only samplers were told apart: er_sde, lcm and uni_pc stand for all of it, in proportion to their own use.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np

from testbed.beds import BEDS

Sigmas = list[float]

FIRST_LIST = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
SECOND_LIST = (0.909375, 0.725, 0.421875, 0.0)


@dataclass(frozen=True)
class Setting:
    """One way to sample, and the beds that stand for the models it is used with.

    beds: names of beds or of their models, or patterns of them; what does not exist is left out, and of "a|b" the first
    one that exists is used.
    lists: sigmas of every stage, each begun with new noise on the result before it; () for the scheduler `simple`.
    experts: models that share one sampling, the next one going on where the last one stopped.
    """

    name: str
    weight: float
    sampler: str
    steps: int  # of all stages together
    cfg: float
    beds: tuple[str, ...]
    lists: tuple[tuple[float, ...], ...] = ()
    experts: int = 1

    @property
    def stages(self) -> int:
        """Samplings of one job."""
        return len(self.lists) or self.experts

    def plan(self, steps: int, scheduled: Callable[[int], Sequence[float]]) -> list[Sigmas]:
        """Sigmas of every stage of a job of so many steps in all; scheduled: sigmas of a number of steps."""
        if self.lists:
            edges = cuts(steps, [len(sigmas) - 1 for sigmas in self.lists])
            return [resampled(sigmas, b - a) for sigmas, a, b in zip(self.lists, edges, edges[1:])]
        sigmas, edges = list(scheduled(steps)), cuts(steps, [1] * self.experts)
        return [sigmas[a : b + 1] for a, b in itertools.pairwise(edges)]


def cuts(steps: int, shares: Sequence[int]) -> list[int]:
    """Where to cut a number of steps into parts of about these shares: the first step of each, and the end."""
    return [round(steps * part / sum(shares)) for part in (0, *np.cumsum(shares))]


def resampled(sigmas: Sequence[float], steps: int) -> Sigmas:
    """A list of sigmas with another number of steps: interpolated by position, ends kept."""
    return np.interp(np.linspace(0, len(sigmas) - 1, steps + 1), np.arange(len(sigmas)), sigmas).tolist()


TURBO_CLIP, TURBO_STILL = "emoji_wan_turbo8|wan", "emoji_mmdit_turbo8|mmdit"
LISTS = dict(beds=(TURBO_CLIP, TURBO_STILL, "photos_*turbo8"), lists=(FIRST_LIST, SECOND_LIST))
GUIDED = dict(beds=("emoji_wan_guided|wan", "mmdit", "photos_lumina"))
BASE = dict(beds=("mmdit", "wan", "photos_lumina"))
EIGHT = dict(beds=(TURBO_STILL, TURBO_CLIP, "photos_*turbo8"))
SETTINGS = (
    Setting("res_multistep 20", 17, "res_multistep", 20, 1.0, **GUIDED),  # MiniMax H3
    Setting("euler 20", 2, "euler", 20, 1.0, **GUIDED),  # Flux 2
    Setting("euler 25", 9, "euler", 25, 1.0, **GUIDED),  # Qwen-Image 2.1
    Setting("euler 20, cfg 4.5", 1, "euler", 20, 4.5, **BASE),  # Klein base
    Setting("euler 10+10, cfg 3.5", 11, "euler", 20, 3.5, ("wan", "mmdit"), experts=2),  # Wan 2.2
    Setting("euler, lists 8+3", 20, "euler", 11, 1.0, **LISTS),  # LTX 2.3
    Setting("res_multistep 8", 9, "res_multistep", 8, 1.0, **EIGHT),  # Z-Image Turbo
    Setting("euler 8", 7, "euler", 8, 1.0, **EIGHT),  # Krea 2 Turbo
    Setting("euler_ancestral, lists 8+3", 6, "euler_ancestral", 11, 1.0, **LISTS),  # LTX 2.5
    Setting("euler 4", 4, "euler", 4, 1.0, ("emoji_mmdit_turbo4|mmdit", "photos_*turbo4")),  # Lightning LoRAs
    Setting("euler 40, cfg 4", 3, "euler", 40, 4.0, **BASE),  # Qwen-Edit 2511
    Setting("er_sde 25, cfg 2.5", 3, "er_sde", 25, 2.5, **BASE),
    Setting("lcm 6", 5, "lcm", 6, 1.0, (TURBO_CLIP, TURBO_STILL)),
    Setting("uni_pc 20, cfg 5", 3, "uni_pc", 20, 5.0, ("wan", "mmdit")),
)


def beds_of(setting: Setting, wanted: Sequence[str] = ()) -> list[str]:
    """The beds for a setting that exist, each once; of the `wanted` ones, all that may stand for it."""
    choices = [[existing(name) for name in choice.split("|")] for choice in setting.beds]
    found = itertools.chain(*(itertools.chain(*choice) if wanted else first(choice) for choice in choices))
    return list(dict.fromkeys(bed for bed in found if not wanted or bed in wanted))


def first(choice: Sequence[list[str]]) -> list[str]:
    """The first one that is not empty."""
    return next(filter(None, choice), [])


def existing(name: str) -> list[str]:
    """The beds that a name or a pattern stands for."""
    return [bed for bed, known in BEDS.items() if fnmatch(bed, name) or fnmatch(known.model, name)]
