"""The automatic mode: how often to compute, from how far the picture may be from full sampling.

Like the step size control of an ODE solver. Every computed evaluation shows, for free, what the
forecast that it did not need was worth. On three models and over 50 dB, the error of a picture was found
to follow from these alone: error of the slope times the span in sigma of the gap, relative to the latent,
squares added up over the gaps. So the wanted closeness is a sum that a run may spend. Carried ahead, an
error grows with the gap; the longest gap is taken that leaves as much for every gap after it.
"""
from dataclasses import dataclass

from .clock import Window
from .gate import rms
from .schedule import Interval, IntervalSchedule

# PSNR in dB that nine of ten pictures exceed whose run may spend squared effects of 1 in sum, by the solver
# whose wrong steps are made good (None: they are not), see `correction`. Fitted on tuning prompts of three
# models, at 12 to 50 steps and cfg 1 to 9. The median picture is 8 dB closer.
REACHED = {"euler": 26.0, "dpmpp_2m": 22.0, "res_multistep": 22.0, None: 16.0}
# Asked for less, fewer steps can be better: forecasts then feed on their own errors.
LEAST, LEAST_UNCORRECTED = 30.0, 42.0
WORSE = 3.0  # an error so many times the foreseen one is taken as no larger: it may be a single bad forecast


@dataclass(frozen=True)
class AutoSettings:
    """closeness: wanted PSNR to full sampling in dB; window: the part of sampling in which to skip;
    longest: the longest gap from one computed evaluation to the next."""
    closeness: float = 42.0
    window: Window = Window()
    longest: int = 4


def least(solver):
    """The lowest closeness in dB that is worth asking for; solver: one of REACHED."""
    return LEAST if solver else LEAST_UNCORRECTED


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


class Rhythm:
    """The gap between computed evaluations, during one run."""

    def __init__(self, settings, percent_to_sigma, solver):
        """solver: one of REACHED."""
        self.schedule = IntervalSchedule(Interval(1, settings.window), percent_to_sigma)
        wanted = max(settings.closeness, least(solver))
        self.allowed = 10 ** ((REACHED[solver] - wanted) / 10)  # sum of squared effects to come
        self.longest = settings.longest if solver else 2
        self.last = None  # the last computed evaluation
        self.passed, self.span = 1, 0.0  # evaluations and sigma between the last two of them
        self.expected = None  # error at the end of the gap
        self.revisits = False  # the sampler comes back to a sigma, as those with two calls a step do

    def may_skip(self, evaluation, signals):
        """True when `evaluation` may be forecast.

        signals: the Foresight of every signal that would be, read only where the next gap is chosen.
        """
        if self.schedule.computed_at == evaluation.ordinal - 1:
            self._choose(evaluation, foreseen(signals))
        return self.schedule.may_skip(evaluation)

    def computed(self, evaluation):
        """Note that everything was computed at `evaluation`."""
        if self.last is not None:
            self.passed, self.span = evaluation.ordinal - self.last.ordinal, self.last.sigma - evaluation.sigma
        self.last = evaluation
        self.schedule.computed(evaluation)

    def reset(self):
        """Forget the past, so that the next evaluation is computed."""
        self.schedule.reset()
        self.schedule.every, self.passed, self.last, self.expected = 1, 1, None, None

    def _choose(self, evaluation, error):
        """Set the gap that begins with the last computed evaluation; error: what its own forecast was wrong by."""
        if self.passed > 1:
            self.allowed -= (error * self.span) ** 2
        sigmas = [self.last.sigma, evaluation.sigma, *evaluation.following]
        left = len(sigmas) - 1
        again = abs(sigmas[0] - sigmas[1]) < 1e-6 * sigmas[0]
        self.revisits |= again
        # An error was seen to grow like the gap, and to stay the same for gaps alike. If it grew more, it goes on so.
        known = self.expected and not self.revisits
        growth = min(max(error / self.expected, 1.0), WORSE) if known else 1.0
        effect = lambda gap: growth * error / self.passed * gap * (sigmas[0] - sigmas[min(gap, left)])
        fits = [gap for gap in range(2, self.longest + 1) if effect(gap) ** 2 * left / gap <= self.allowed]
        # Where a sigma was seen just before, nearly the same is computed twice: only that is skipped then.
        wanted = max(fits, default=1) if again or not self.revisits else 1
        self.schedule.every = min(wanted, self.schedule.every + 1)
        self.expected = error / self.passed * self.schedule.every


def foreseen(signals):
    """Relative error of the latent's slope by forecasts of all signals, root mean square over the batch, a float.

    Reads one number from the device, at a moment when the host has waited for it anyway.
    """
    return float(sum(signal.error for signal in signals).pow(2).mean().sqrt())
