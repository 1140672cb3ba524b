"""Samplers as they stand in k-diffusion and in the host, word by word, for floats and tensors.

A sigma of 0 before the end starts sampling again from there, with the same noise: no model is asked at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
Model = Callable[[T, float], T]  # (latent, sigma) -> denoised latent
Sampler = Callable[[Model, T, Sequence[float]], T]


def euler(model: Model, x: T, sigmas: Sequence[float]) -> T:
    """First order."""
    noise = x
    for sigma, following in pairwise(sigmas):
        if sigma == 0:
            x = (1 - following) * x + following * noise
            continue
        x = x + (x - model(x, sigma)) / sigma * (following - sigma)
    return x


def heun(model: Model, x: T, sigmas: Sequence[float]) -> T:
    """Second order by two calls a step, the second at the sigma of the next step."""
    noise = x
    for sigma, following in pairwise(sigmas):
        if sigma == 0:
            x = (1 - following) * x + following * noise
            continue
        slope = (x - model(x, sigma)) / sigma
        if following > 0:
            probed = x + slope * (following - sigma)
            slope = (slope + (probed - model(probed, following)) / following) / 2
        x = x + slope * (following - sigma)
    return x


def dpmpp_2m(model: Model, x: T, sigmas: Sequence[float]) -> T:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2."""

    def step(x: T, new: T, old: T, last: float, sigma: float, following: float) -> T:
        h, h_last = math.log(sigma / following), math.log(last / sigma)
        r = h_last / h
        change = (1 + 1 / (2 * r)) * new - (1 / (2 * r)) * old
        return following / sigma * x - math.expm1(-h) * change

    return _multistep(step, model, x, sigmas)


def res_multistep(model: Model, x: T, sigmas: Sequence[float]) -> T:
    """RES, second order, arXiv 2308.02157."""

    def step(x: T, new: T, old: T, last: float, sigma: float, following: float) -> T:
        h, c2 = math.log(sigma / following), -math.log(last / sigma) / math.log(sigma / following)
        phi1 = math.expm1(-h) / -h
        phi2 = (phi1 - 1) / -h
        return math.exp(-h) * x + h * ((phi1 - phi2 / c2) * new + phi2 / c2 * old)

    return _multistep(step, model, x, sigmas)


SAMPLERS: dict[str, Sampler] = {
    "sample_euler": euler,
    "sample_dpmpp_2m": dpmpp_2m,
    "sample_res_multistep": res_multistep,
    "sample_heun": heun,
}


def _multistep(step: Callable[[T, T, T, float, float, float], T], model: Model, x: T, sigmas: Sequence[float]) -> T:
    """Steps from the last two denoised latents; of first order at both ends and where sigma does not fall."""
    old, last, noise = None, 0.0, x
    for sigma, following in pairwise(sigmas):
        if sigma == 0:
            x, old = (1 - following) * x + following * noise, None
            continue
        new = model(x, sigma)
        if old is None or not 0 < following < sigma < last:
            x = following / sigma * x + (1 - following / sigma) * new
        else:
            x = step(x, new, old, last, sigma, following)
        old, last = new, sigma
    return x
