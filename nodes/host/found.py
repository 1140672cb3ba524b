"""Policies that Auto-FR found, kept in a file for each model, sampler and number of steps."""

from __future__ import annotations

import os

import comfy.samplers
import numpy as np

from ...fastercache_core.calibration.policy import Policy
from ...fastercache_core.calibration.policy_file import MAX_BYTES, dumps, loads
from ...fastercache_core.clock import GRID_TOLERANCE
from .compatibility import RunSetup, sampler_name
from .fingerprint import model_fingerprint, other_size, size_of
from .user_files import folders, write_whole

FOLDER = "found"


def keep(policy: Policy) -> str:
    """Write the policy to the file that runs find it in, in place of an earlier one; returns the path."""
    found = policy.setup
    sampler = sampler_name(comfy.samplers.sampler_object(found.sampler))
    path = os.path.join(folders(FOLDER)[0], _name(found.model, sampler, found.steps))
    write_whole(path, dumps(policy))
    return path


def kept(setup: RunSetup) -> tuple[Policy, float] | None:
    """The policy that was found for exactly this run, and when, in seconds since 1970; None where there is none.

    Raises PolicyError or OSError where its file cannot be used.
    """
    if not any(map(os.path.isdir, folders(FOLDER))):
        return None
    name = _name(model_fingerprint(setup.guider.model_patcher), setup.sampler_name, len(setup.sigmas) - 1)
    path = next(filter(os.path.isfile, (os.path.join(folder, name) for folder in folders(FOLDER))), None)
    if path is None:
        return None
    with open(path, "rb") as file:
        policy = loads(file.read(MAX_BYTES + 1))
    return (policy, os.path.getmtime(path)) if _is_for(policy, setup) else None


def _name(model: str, sampler: str, steps: int) -> str:
    return f"{model} {sampler} {steps}.json"


def _is_for(policy: Policy, setup: RunSetup) -> bool:
    """True when cfg, noise levels and size of a run are those of the policy."""
    sigmas = setup.sigmas[:-1]
    same_grid = len(sigmas) == len(policy.sigmas) and np.allclose(sigmas, policy.sigmas, rtol=GRID_TOLERANCE)
    same_cfg = setup.cfg is not None and abs(setup.cfg - policy.setup.cfg) < 1e-6
    return bool(same_grid and same_cfg and not other_size(policy.setup.resolution, size_of(setup.shape)))
