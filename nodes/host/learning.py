"""What the errors of a run mean on the user's own model: learnt from pictures, kept in a file for each model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from torch import Tensor

from ...fastercache_core import messages
from ...fastercache_core.actions import Action
from ...fastercache_core.calibration.learnt_file import MAX_BYTES, Learnt, LearntError, dumps, kind, loads
from ...fastercache_core.law import Law, constant
from ...fastercache_core.metrics import latent_psnr
from ...fastercache_core.report import RunReport
from ...fastercache_core.solvers import Solver
from .compatibility import RunSetup
from .fingerprint import model_fingerprint
from .user_files import folders, write_whole

FOLDER = "learnt"
# A run in which a smaller share of the evaluations was skipped shows hardly anything of its errors.
LEAST_SKIPPED = 0.1


def law_of(setup: RunSetup, report: RunReport) -> Law:
    """How the PSNR of a run follows from its errors, as far as is known on its model; the report says what it is by."""
    law = (setup.solver or Solver()).law
    if not any(map(os.path.isdir, folders(FOLDER))):
        return law
    try:
        constants = _known(model_fingerprint(setup.guider.model_patcher)).of(_kind(setup))
    except (LearntError, OSError) as error:
        _tell(report, messages.learnt_unreadable(error))
        return law
    if constants:
        _tell(report, messages.calibrated(_kind(setup), law.learnt(constants), law))
    return law.learnt(constants)


def learn(setup: RunSetup, report: RunReport, latent: Tensor, in_full: Callable[[], Tensor] | None) -> None:
    """Add what a run shows to the file of its model; the report says what that was.

    latent: of the run, [batch, ...]; in_full(): the same sampled in full, asked for only if it is of use; None where it
    would be of none.
    """
    spent, evaluations = report.run.get("spent"), report.evaluations
    skipped = sum({*record.actions.values()} != {Action.COMPUTE.value} for record in evaluations)
    if in_full is None or not spent or skipped < LEAST_SKIPPED * len(evaluations):
        return _tell(report, messages.NOTHING_LEARNT)
    closeness = latent_psnr(latent, in_full()).tolist()
    report.run["psnr"] = [round(value, 2) for value in closeness if math.isfinite(value)]
    constants = [constant(value, spent) for value in report.run["psnr"]]
    try:
        _tell(report, _remember(setup, constants))
    except (LearntError, OSError) as error:
        _tell(report, messages.not_learnt(error))


def _remember(setup: RunSetup, constants: list[float]) -> str:
    """Add pictures to the file of a model; returns what is known with them."""
    learnt = _known(model_fingerprint(setup.guider.model_patcher)).adding(_kind(setup), constants)
    write_whole(_paths(learnt.model)[0], dumps(learnt))
    law = (setup.solver or Solver()).law
    return messages.learnt(_kind(setup), law.learnt(learnt.of(_kind(setup))), law)


def _known(model: str) -> Learnt:
    """What is known of the model with this fingerprint. Raises LearntError where its file cannot be used."""
    path = next(filter(os.path.isfile, _paths(model)), None)
    if path is None:
        return Learnt(model)
    try:
        with open(path, "rb") as file:
            return loads(file.read(MAX_BYTES + 1), model)
    except LearntError as error:
        raise LearntError(f"{os.path.basename(path)}: {error}") from None


def _paths(model: str) -> list[str]:
    return [os.path.join(folder, f"{model}.json") for folder in folders(FOLDER)]


def _kind(setup: RunSetup) -> str:
    return kind(setup.sampler_name, len(setup.sigmas) - 1)


def _tell(report: RunReport, sentence: str) -> None:
    """In the notes, and on the node."""
    report.run["calibration"] = sentence
    report.note(sentence)
