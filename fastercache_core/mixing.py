"""Score mixing: between two keyframes, how much to trust reused features against the held score.

FRDiff (arXiv 2312.03517), as in its released code: with r the part of sampling that is done,

    lambda = clip((tau * (r - b) + 2) / 4, 0, 1),     score = lambda * reused + (1 - lambda) * held

so early evaluations take no network call at all (lambda 0) and late ones only reuse features
(lambda 1). r is the step number over the number of steps of DDIM there; here it follows from sigma,
so that it means the same with any scheduler.
"""
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from .clock import Window

# Stable Diffusion's noise schedule, on which the defaults of `tau` and `bias` were chosen.
TIMESTEPS = 1000
BETA_ROOTS = (0.00085 ** 0.5, 0.012 ** 0.5)
# Below this the released code makes no network call.
NO_CALL = 1e-10

CONSTANT = {"scores": 0.0, "features": 1.0}
MIXINGS = ("automatic", "paper", "scores", "features")


@dataclass(frozen=True)
class MixSettings:
    """every: one keyframe in so many evaluations (M); mixing: "paper" = lambda as above, "scores" = 0
    and "features" = 1 throughout, "automatic" = 0, and no skipping where a host knows better; tau, bias:
    slope and middle of lambda; window: the part of sampling outside which every evaluation is a keyframe."""
    every: int = 2
    mixing: str = "paper"
    tau: float = 30.0
    bias: float = 0.5
    window: Window = field(default_factory=Window)


class MixSchedule:
    """Which evaluations are keyframes, and lambda of the others, during one run."""

    def __init__(self, settings, percent_to_sigma, timestep, sigmas=()):
        """timestep(sigma) -> 0..1000: the model's own, or `flow_timestep`. sigmas: of the run, noisiest first."""
        self.settings = settings
        self.timestep = timestep
        self.offset = first_offset([done(sigma, timestep) for sigma in sigmas[:2]])
        self.high, self.low = settings.window.sigmas(percent_to_sigma)

    def is_keyframe(self, evaluation, phase=0):
        """True for ordinals 0, M, 2M ... and outside the window.

        phase: by how many evaluations keyframes come earlier than that; the first one is always one.
        """
        inside = self.low <= evaluation.sigma <= self.high
        return not inside or evaluation.ordinal == 0 or (evaluation.ordinal + phase) % self.settings.every == 0

    def share(self, evaluation):
        """Lambda at `evaluation`: 0.0 = JUMP, no network call; 1.0 = REUSE; between = MIX."""
        if self.settings.mixing in CONSTANT:
            return CONSTANT[self.settings.mixing]
        share = mix_share(done(evaluation.sigma, self.timestep) - self.offset, self.settings.tau, self.settings.bias)
        return 0.0 if share < NO_CALL else share


def mix_share(r, tau=30.0, bias=0.5):
    """Lambda at the part `r` (0 to 1) of sampling that is done."""
    return min(max((tau * (r - bias) + 2.0) / 4.0, 0.0), 1.0)


def done(sigma, timestep):
    """The part of sampling that is done at `sigma`: i/T on DDIM's grid of evenly spaced timesteps."""
    return 1.0 - float(timestep(sigma)) / TIMESTEPS


def first_offset(parts):
    """What to take off `done`, so that it is 0 at the first of a run's evaluations: at most one step.

    DDIM's grid begins up to one step below the noisiest timestep. parts: `done` at the first two sigmas.
    """
    return min(parts[0], parts[1] - parts[0]) if len(parts) == 2 else 0.0


def flow_timestep(sigma):
    """The timestep at which Stable Diffusion has the signal-to-noise ratio of a flow model at `sigma` (0 to 1)."""
    ratio = sigma / max(1.0 - sigma, 1e-9)
    return float(np.interp(np.log(max(ratio, 1e-9)), _log_sigmas(), np.arange(1, TIMESTEPS + 1)))


def mix(reused, held, share):
    """share * reused + (1 - share) * held: a new tensor of their shape, both made for the same sigma."""
    return torch.lerp(held, reused, share)


@cache
def _log_sigmas():
    kept = np.cumprod(1.0 - np.linspace(*BETA_ROOTS, TIMESTEPS) ** 2)
    return np.log((1.0 - kept) / kept) / 2.0
