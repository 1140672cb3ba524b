"""Facts about samplers, one row each: how they call the network, and how their step moves the latent.

Names are those of the functions that samplers run, as in k-diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log

from .law import Law

# How far a step moves the latent for one unit of the denoised latent of the evaluation before. Given: the step's share
# of what is left to do, and how far it goes and the one before it went in log sigma.
PreviousWeight = Callable[[float, float, float], float]

# Of solvers whose predicted steps are corrected, of first order and of second; of those that add noise, whose steps are
# predicted but not corrected; and of others. Fitted on tuning prompts to the PSNR of decoded pictures (six models, 8 to
# 30 steps, cfg 1 and 4.5; benchmarks/promise.py).
EULER, MULTISTEP = Law(32.2, between=3.0, within=5.0), Law(46.0, between=4.5, within=6.0)
NOISY, UNCORRECTED = Law(19.0, between=7.5, within=4.0), Law(23.5, between=3.0, within=5.0)


# With steps of equal length, solvers that add noise or build on earlier evaluations go so many times as far as Euler.
FARTHER = 2.0
# How much longer, in log sigma, a step was at most than the one before it, in schedulers' lists of 20 noise levels.
UNEVEN = 5.0


@dataclass(frozen=True)
class Solver:
    """What is known of a sampler.

    calls: network calls a step; order: of the solver; noise: fresh noise is added on the way; previous: the weight of
    the previous denoised latent in its step, None where its steps are not known, so that errors of predicted steps
    cannot be corrected; law: how the PSNR of a picture follows from the errors of its run; known: its calls and steps
    are, False for one that is taken for the worst of all.
    """

    calls: int = 1
    order: int = 1
    noise: bool = False
    previous: PreviousWeight | None = None
    law: Law = UNCORRECTED
    known: bool = True

    @property
    def corrects(self) -> bool:
        """True when errors of predicted steps can be corrected."""
        return self.previous is not None

    @property
    def walks_grid(self) -> bool:
        """True when its evaluations lie at the sigmas that it was given, one after the other."""
        return self.calls == 1 and not self.noise

    @property
    def extrapolates(self) -> bool:
        """True when it continues differences between earlier evaluations over its steps, in ways not known here."""
        return self.calls == 1 and self.order > 1 and not self.corrects and not (self.noise and self.known)

    def amplifies(self, sigmas: Sequence[float]) -> float:
        """How many times as far as Euler's step an error of one evaluation moves the latent at most.

        sigmas: of the run, noisiest first. A polynomial through earlier evaluations multiplies their differences by the
        ratio of a step to the one before it, once for each order; what corrects them goes through it once more.
        """
        if self.calls > 1 or not (self.noise or self.order > 1):
            return 1.0
        uneven = unevenness(sigmas) if self.extrapolates or self.corrects else 1.0
        return FARTHER * uneven ** (self.order - (not self.corrects))

    def step_weights(self, last: float | None, sigma: float, following: float) -> tuple[float, float]:
        """How far a step from `sigma` to `following` moves the latent for one unit of the denoised latent there, and
        for one of that at `last`, the sigma before it (None: there is none)."""
        share = 1 - following / sigma if sigma > 0 else 0.0
        if self.previous is None or last is None or not 0 < following < sigma < last:
            return share, 0.0
        before = self.previous(share, log(sigma / following), log(last / sigma))
        return share - before, before


def unevenness(sigmas: Sequence[float]) -> float:
    """How many times as long, in log sigma, a step is at most as the one before it; UNEVEN where that is not known."""
    falling = [s for s in sigmas if s > 0]
    lengths = [log(a / b) for a, b in pairwise(falling) if a > b]
    # The first step of a flow model begins where noise is all there is.
    return max([1.0, *(b / a for a, b in pairwise(lengths[1:]))]) if len(lengths) > 2 else UNEVEN


def _euler(share: float, ahead: float, behind: float) -> float:
    return 0.0


def _dpmpp_2m(share: float, ahead: float, behind: float) -> float:
    return -share * ahead / behind / 2  # arXiv 2211.01095, algorithm 2


def _res_multistep(share: float, ahead: float, behind: float) -> float:
    return -(ahead - share) / behind  # arXiv 2308.02157


# fmt: off
SOLVERS = {
    "sample_euler": Solver(previous=_euler, law=EULER),
    "sample_euler_cfg_pp": Solver(),
    "sample_euler_ancestral": Solver(noise=True),
    "sample_euler_ancestral_RF": Solver(noise=True),
    "sample_euler_ancestral_cfg_pp": Solver(noise=True),
    "sample_ddpm": Solver(noise=True),
    "sample_lcm": Solver(noise=True),
    "sample_lms": Solver(order=4),
    "sample_ipndm": Solver(order=4),
    "sample_ipndm_v": Solver(order=4),
    "sample_deis": Solver(order=3),
    "sample_unipc": Solver(order=3),
    "sample_unipc_bh2": Solver(order=3),
    "sample_dpmpp_2m": Solver(order=2, previous=_dpmpp_2m, law=MULTISTEP),
    "sample_dpmpp_2m_cfg_pp": Solver(order=2),
    "sample_res_multistep": Solver(order=2, previous=_res_multistep, law=MULTISTEP),
    "sample_res_multistep_cfg_pp": Solver(order=2),
    "sample_res_multistep_ancestral": Solver(order=2, noise=True),
    "sample_res_multistep_ancestral_cfg_pp": Solver(order=2, noise=True),
    "sample_gradient_estimation": Solver(order=2),
    "sample_gradient_estimation_cfg_pp": Solver(order=2),
    "sample_dpmpp_2m_sde": Solver(order=2, noise=True),
    "sample_dpmpp_2m_sde_gpu": Solver(order=2, noise=True),
    "sample_dpmpp_2m_sde_heun": Solver(order=2, noise=True),
    "sample_dpmpp_2m_sde_heun_gpu": Solver(order=2, noise=True),
    "sample_dpmpp_3m_sde": Solver(order=3, noise=True),
    "sample_dpmpp_3m_sde_gpu": Solver(order=3, noise=True),
    "sample_er_sde": Solver(order=3, noise=True),
    "sample_sa_solver": Solver(order=3, noise=True),
    "sample_heun": Solver(calls=2, order=2),
    "sample_heunpp2": Solver(calls=3, order=2),
    "sample_dpm_2": Solver(calls=2, order=2),
    "sample_dpm_2_ancestral": Solver(calls=2, order=2, noise=True),
    "sample_dpm_2_ancestral_RF": Solver(calls=2, order=2, noise=True),
    "sample_dpmpp_2s_ancestral": Solver(calls=2, order=2, noise=True),
    "sample_dpmpp_2s_ancestral_RF": Solver(calls=2, order=2, noise=True),
    "sample_dpmpp_2s_ancestral_cfg_pp": Solver(calls=2, order=2, noise=True),
    "sample_dpmpp_sde": Solver(calls=2, order=2, noise=True),
    "sample_dpmpp_sde_gpu": Solver(calls=2, order=2, noise=True),
    "sample_sa_solver_pece": Solver(calls=2, order=3, noise=True),
    "sample_seeds_2": Solver(calls=2, order=2, noise=True),
    "sample_seeds_3": Solver(calls=3, order=3, noise=True),
    "sample_exp_heun_2_x0": Solver(calls=2, order=2),
    "sample_exp_heun_2_x0_sde": Solver(calls=2, order=2, noise=True),
}
# fmt: on
# A sampler from elsewhere: known by its evaluations alone.
UNKNOWN = Solver(order=3, noise=True, known=False)
# These choose their steps by what the network gives, so that another output means other evaluations.
ADAPTIVE = ("sample_dpm_adaptive", "dpm_adaptive_function")


def find_solver(name: str, churn: float = 0.0) -> Solver | None:
    """The row of the sampling function `name`, UNKNOWN where there is none; None for one of ADAPTIVE.

    churn: s_churn of the sampler; above 0 it adds noise on the way.
    """
    solver = None if name in ADAPTIVE else SOLVERS.get(name, UNKNOWN)
    return replace(solver, noise=True, previous=None, law=UNCORRECTED) if solver and churn > 0 else solver
