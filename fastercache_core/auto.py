"""The automatic mode: how often to compute, from how far the picture may be from full sampling.

Like the step size control of an ODE solver. Every computed evaluation shows, for free, what the
forecast that it did not need was worth. On three models and over 50 dB, the error of a picture was found
to follow from these alone: error of the slope times the span in sigma of the gap, relative to the latent,
squares added up over the gaps. So the wanted closeness is a sum that a run may spend. Carried ahead, an
error grows with the gap; the longest gap is taken that leaves as much for every gap after it.
"""
from dataclasses import dataclass

import torch

from .clock import Window
from .gate import rms
from .reading import Reading
from .schedule import Interval, IntervalSchedule

# PSNR in dB that nine of ten pictures exceed whose run may spend squared effects of 1 in sum, by the solver
# whose wrong steps are made good (None: they are not), see `correction`. Fitted on tuning prompts of three
# models, at 12 to 50 steps and cfg 1 to 9. The median picture is 8 dB closer.
REACHED = {"euler": 26.0, "dpmpp_2m": 22.0, "res_multistep": 22.0, None: 16.0}
# Asked for less, fewer steps can be better: forecasts then feed on their own errors. Where a sampler adds noise,
# fewer steps give another picture.
LEAST, LEAST_NOISY, LEAST_UNCORRECTED = 30.0, 36.0, 42.0
LONGEST_REUSE = 3  # the longest gap in which features are reused
WORSE = 3.0  # an error so many times the foreseen one is taken as no larger: it may be a single bad forecast


@dataclass(frozen=True)
class AutoSettings:
    """closeness: wanted PSNR to full sampling in dB; window: the part of sampling in which to skip;
    longest: the longest gap from one computed evaluation to the next."""
    closeness: float = 42.0
    window: Window = Window()
    longest: int = 4


def least(solver, noise=False):
    """The lowest closeness in dB that is worth asking for; solver: one of REACHED; noise: the sampler adds noise."""
    return LEAST if solver else LEAST_NOISY if noise else LEAST_UNCORRECTED


class Foresight:
    """What the newest forecast of one signal was wrong by."""

    def __init__(self):
        self.error = None  # [batch], None before anything was forecast

    def observe(self, history, sigma, true, unit):
        """Compare what `history` (a History) would have said at `sigma` with the truth.

        true: [batch, ...]; unit: [batch], turns an error into a relative one of the latent's slope.
        """
        if history.nodes:  # a single known value is simply held
            self.error = rms(history.at(sigma) - true) * unit


@dataclass
class Gap:
    """What lay between two computed evaluations.

    passed: evaluations; span: in sigma; expected: error at its end, None where none was foreseen; reused: whether
    features filled it.
    """
    passed: int = 1
    span: float = 0.0
    expected: float | None = None
    reused: bool = False


class Rhythm:
    """The gap between computed evaluations, during one run, and what fills it."""

    def __init__(self, settings, percent_to_sigma, solver, late=False):
        """settings: AutoSettings, asking for no less than `least` says; solver: one of REACHED; late: decide by
        what was known a gap earlier, see Reading."""
        self.schedule = IntervalSchedule(Interval(1, settings.window), percent_to_sigma)
        self.reuse = IntervalSchedule(Interval(1, settings.window), percent_to_sigma)
        self.reading = Reading(late)
        self.allowed = 10 ** ((REACHED[solver] - settings.closeness) / 10)  # sum of squared effects to come
        self.longest = settings.longest if solver else 2
        self.last = None  # the last computed evaluation
        self.gap = Gap()  # the one before it, or that is now
        self.revisits = False  # the sampler comes back to a sigma, as those with two calls a step do

    def may_skip(self, evaluation, signals, trial=None):
        """True when `evaluation` may be forecast.

        signals: the Foresight of every signal that would be, and trial: the Trial of reused features, if any,
        both read only where the next gap is chosen.
        """
        if self.schedule.computed_at == evaluation.ordinal - 1:
            self._choose(evaluation, *self._read(signals, trial))
        return self.schedule.may_skip(evaluation)

    def may_reuse(self, evaluation):
        """True when features may be reused at `evaluation`; ask after `may_skip`."""
        return self.reuse.may_skip(evaluation)

    def reused(self):
        """Note that features were reused in this gap."""
        self.gap.reused = True

    def computed(self, evaluation):
        """Note that everything was computed at `evaluation`."""
        if self.last is not None:
            self.gap.passed = evaluation.ordinal - self.last.ordinal
            self.gap.span = self.last.sigma - evaluation.sigma
        self.last = evaluation
        self.schedule.computed(evaluation)
        self.reuse.computed(evaluation)

    def reset(self):
        """Forget the past, so that the next evaluation is computed."""
        for part in (self.schedule, self.reuse, self.reading):
            part.reset()
        self.schedule.every = self.reuse.every = 1
        self.last, self.gap = None, Gap()

    def _read(self, signals, trial):
        """A Gap, and what is known since its end: error of the latent's slope by the forecasts of all signals, that by
        features for each evaluation of their age (floats, None where unknown), and whether these are deep."""
        errors = {"forecast": sum(signal.error for signal in signals) if signals else None,
                  "reused": trial and trial.error}
        known = {name: error.pow(2).mean().sqrt() for name, error in errors.items() if error is not None}
        if not known:
            return self.gap, None, None, False
        about = self.gap, known.keys(), trial and trial.deep
        numbers, about = self.reading.read(torch.stack([*known.values()]), about)
        if about is None:
            return Gap(), None, None, False
        gap, names, deep = about
        found = dict(zip(names, numbers))
        return gap, found.get("forecast"), found.get("reused"), deep

    def _choose(self, evaluation, gap, error, aged, deep):
        """Set the gap that begins with the last computed evaluation, by what `_read` gave."""
        wrong = aged * gap.passed if gap.reused else error
        if gap.passed > 1 and wrong is not None:  # a window of a long video may have been away
            self.allowed -= (wrong * gap.span) ** 2
        sigmas = [self.last.sigma, evaluation.sigma, *evaluation.following]
        self._choose_skipping(gap, error, sigmas)
        # Skipping the negative pass saves half of what skipping a step does, and less than deep features do.
        better = self.schedule.every == 1 or deep
        self.reuse.every = self._longest(aged, LONGEST_REUSE, sigmas) if better else 1
        longest = max(self.schedule.every, self.reuse.every)
        self.gap = Gap(expected=error and error / gap.passed * longest)

    def _choose_skipping(self, gap, error, sigmas):
        """Set the gap of forecasts, after `gap` with `error`; sigmas: of the last computed evaluation and all later."""
        again = abs(sigmas[0] - sigmas[1]) < 1e-6 * sigmas[0]
        self.revisits |= again
        # An error was seen to grow like the gap, and to stay the same for gaps alike. If it grew more, it goes on so.
        known = error and gap.expected and not self.revisits
        growth = min(max(error / gap.expected, 1.0), WORSE) if known else 1.0
        longest = self._longest(error and growth * error / gap.passed, self.longest, sigmas)
        # Where a sigma was seen just before, nearly the same is computed twice: only that is skipped then.
        wanted = longest if again or not self.revisits else 1
        self.schedule.every = min(wanted, self.schedule.every + 1)

    def _longest(self, aged, longest, sigmas):
        """The longest gap that leaves as much for every gap after it; aged: error for each evaluation of it."""
        left = len(sigmas) - 1
        effect = lambda gap: aged * gap * (sigmas[0] - sigmas[min(gap, left)])
        gaps = range(2, longest + 1) if aged is not None else ()
        return max((gap for gap in gaps if effect(gap) ** 2 * left / gap <= self.allowed), default=1)
