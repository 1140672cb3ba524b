"""From the errors of a run to the PSNR of its picture: an estimate with its uncertainty, and what it learns.

A run whose squared errors add up to E has a PSNR of `constant - 10 log10(E)` to full sampling. The constant differs
from model to model, and from picture to picture of one model. For a model that nothing is known of, both spreads count;
pictures that were sampled in full beside a cached run show the constant of their model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log10, sqrt
from statistics import fmean

NINE_OF_TEN = 1.2815515655446004  # standard deviations below the mean of a normal distribution that nine of ten exceed


@dataclass(frozen=True)
class Law:
    """Distribution of the constant, normal, in dB.

    mean: over models; between: standard deviation from model to model; within: that from picture to picture of one
    model; pictures: how many of the user's own model it has learnt from.
    """

    mean: float
    between: float
    within: float
    pictures: int = 0

    @property
    def low(self) -> float:
        """The constant in dB that nine of ten pictures exceed, the model's own mean being uncertain."""
        return self.mean - NINE_OF_TEN * sqrt(self.between**2 + self.within**2)

    def learnt(self, constants: Sequence[float]) -> Law:
        """The law for one model, given the constants in dB of some of its pictures.

        The posterior of the model's own mean: a normal prior over models, normal scatter of its pictures.
        """
        if not constants:
            return self
        seen = len(constants) * self.between**2
        share = seen / (seen + self.within**2)  # of the model's own pictures in the new mean
        mean = self.mean + share * (fmean(constants) - self.mean)
        between = self.between * sqrt(1 - share)
        return replace(self, mean=mean, between=between, pictures=self.pictures + len(constants))

    def budget(self, target: float) -> float:
        """The sum of squared errors with which nine of ten pictures are closer than `target` dB."""
        return 10 ** ((self.low - target) / 10)

    def closeness(self, spent: float) -> tuple[float, float]:
        """PSNR in dB after squared errors of `spent` in all, above 0: the typical one, and what nine of ten exceed."""
        return self.mean - 10 * log10(spent), self.low - 10 * log10(spent)


def constant(psnr: float, spent: float) -> float:
    """The constant in dB of a picture with this PSNR after a sum of squared errors of `spent`, above 0."""
    return psnr + 10 * log10(spent)
