"""PSNR picture by picture: to full sampling, against another run, and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.tools.pictures import closeness
from benchmarks.tools.sampling import Result

EQUAL = 200.0  # dB, in place of infinity

Results = Mapping[str, Sequence[Result]]  # {run name: results, one a batch}


def psnr(results: Results, name: str, reference: str = "full") -> np.ndarray:
    """PSNR in dB of every picture of a run against those of the run `reference`; EQUAL for the very same one."""
    pairs = zip(results[name], results[reference])
    return np.concatenate([closeness(a.pictures, b.pictures)[0] for a, b in pairs]).clip(max=EQUAL)


def gain_over(results: Results, name: str, other: str, label: str = "gain") -> dict[str, Any]:
    """PSNR of one run less that of another, on the pictures where the first one skips at all."""
    mine = psnr(results, name)
    gain = (mine - psnr(results, other))[mine < EQUAL]
    return mean_and_std(label, gain) | {f"{label}_ahead": int((gain > 0).sum()), f"{label}_pictures": len(gain)}


def mean_and_std(label: str, values: np.ndarray) -> dict[str, float | None]:
    """Mean and standard deviation under `label`, None for no values."""
    some = len(values) > 0
    return {label: float(values.mean()) if some else None, f"{label}_std": float(values.std()) if some else None}


def as_text(run: Mapping[str, Any], key: str) -> str:
    """A mean of `mean_and_std` with its standard deviation."""
    value = run.get(key)
    return ("equal" if key == "psnr" else "") if value is None else f"{value:.1f} +- {run[key + '_std']:.1f}"
