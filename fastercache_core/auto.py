"""The automatic mode: how often to compute, from how far the picture may be from full sampling.

Like the step size control of an ODE solver. Every computed evaluation shows, for free, what the
forecast that it did not need was worth; that error is carried ahead, for every gap that could follow.
What the errors of a run may add up to follows from the wanted closeness.

The gap changes rarely: a forecast learns from gaps of one length, and loses when they alternate.
"""
from dataclasses import dataclass
from math import inf

from .clock import Window
from .schedule import Interval, IntervalSchedule

# PSNR in dB that nine of ten pictures exceed when the foreseen effects of their run add up to 1: fitted on
# tuning prompts, at 12 to 50 steps and cfg 2 to 9. The median picture is 5 dB closer.
CLOSENESS = 20.0
UNCORRECTED = 6.0  # dB less where wrong forecasts cannot be made good, see `correction`
# Where one gap does more than this to the latent, forecasts disturb each other and fewer steps are better.
MOST = 16e-3
# A longer gap follows only some gaps alike, and when it would use no more than this part of what is allowed
# (errors grow when gaps do); a shorter one when so much more than allowed would be used.
LONGER, SHORTER, ALIKE = 0.5, 1.4, 2
# Skipping begins in the first part of a run or not at all: late, the steps in sigma are large against sigma,
# errors reach the picture undamped, and little is left to save.
BEGIN = 0.6


@dataclass(frozen=True)
class AutoSettings:
    """closeness: wanted PSNR to full sampling in dB; window: the part of sampling in which to skip;
    longest: the longest gap from one computed evaluation to the next."""
    closeness: float = 42.0
    window: Window = Window()
    longest: int = 4


class Rhythm:
    """The gap between computed evaluations, during one run."""

    def __init__(self, settings, percent_to_sigma, corrected):
        """corrected: wrong forecasts are made good afterwards, see `correction`."""
        self.schedule = IntervalSchedule(Interval(1, settings.window), percent_to_sigma)
        reached = CLOSENESS if corrected else CLOSENESS - UNCORRECTED
        self.budget = 10 ** ((reached - settings.closeness) / 20)
        self.most = MOST if corrected else MOST / 2
        self.longest = settings.longest if corrected else 2
        self.spent = 0.0  # sum of the effects so far
        self.alike = 0    # gaps since the last change

    def may_skip(self, evaluation, rates):
        """True when `evaluation` may be forecast.

        rates: ErrorEstimate.rate of every signal that would be, an iterable, consumed only where the
        next gap is chosen.
        """
        if self.schedule.computed_at == evaluation.ordinal - 1:
            self._choose(evaluation, sum(rates))
        return self.schedule.may_skip(evaluation)

    def computed(self, evaluation):
        """Note that everything was computed at `evaluation`."""
        self.schedule.computed(evaluation)

    def reset(self):
        """Forget the past, so that the next evaluation is computed."""
        self.schedule.reset()
        self.schedule.every, self.alike = 1, 0

    def _choose(self, evaluation, rate):
        gap = self.schedule.every
        if gap == 1 and evaluation.progress > BEGIN:
            return
        self.schedule.every = self._next(gap, lambda g: self._used(g, evaluation, rate))
        self.alike = self.alike + 1 if self.schedule.every == gap else 0
        if self.schedule.may_skip(evaluation):
            self.spent += effect(self.schedule.every, evaluation, rate)

    def _next(self, gap, used):
        """The gap that follows `gap`; used(gap): see _used."""
        if gap > 1 and used(gap) > SHORTER:
            return gap - 1
        if gap > 1 and self.alike < ALIKE:
            return gap
        most = 1 if gap == 1 else LONGER
        return gap + 1 if gap < self.longest and used(gap + 1) <= most else gap

    def _used(self, gap, evaluation, rate):
        """The part of what is allowed that gaps of this length would use up until the end of the run."""
        left = evaluation.ordinal * (1 / evaluation.progress - 1) if evaluation.progress else inf
        one = effect(gap, evaluation, rate)
        return max((self.spent + one * max(left / gap, 1)) / self.budget, one / self.most)


def effect(gap, evaluation, rate):
    """Foreseen relative change of the latent by one gap that begins with `evaluation`.

    rate: error of the latent's slope for one unit of the node polynomial, which for nodes one step
    apart is the step squared. What is left of the errors of a gap after their correction was measured
    to grow like 1, 3, 6 for gaps of 2, 3, 4.
    """
    return rate * evaluation.step ** 3 * gap * (gap - 1) / 2
