"""The policy search: several processes share one study, and what comes out is a policy that the nodes read."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks.search import KNOTS, RANGE, growth, names, shared_study
from fastercache_core.calibration.policy_file import loads
from testbed.server import ROOT

optuna = pytest.importorskip("optuna")


def test_errors_count_alike_where_all_logarithms_are_zero_and_as_told_elsewhere():
    assert np.allclose(growth([0.0] * (KNOTS - 1), 30), 1.0)
    factors = growth([RANGE] * (KNOTS - 1), 30)
    assert factors[0] == pytest.approx(np.exp(RANGE)) and factors[-1] == pytest.approx(1.0)
    early = growth([RANGE, *[0.0] * (KNOTS - 2)], 30)
    assert early[0] == pytest.approx(np.exp(RANGE)) and np.allclose(early[6:], 1.0) and 1.0 < early[3] < early[0]


def test_the_first_trial_of_a_study_is_exact_search_and_is_asked_once(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for _ in range(2):  # two processes that arrive
        study = shared_study(optuna, tmp_path / "journal", "one")
    asked = [study.ask() for _ in range(2)]
    drawn = [[trial.suggest_float(name, -RANGE, RANGE) for name in names()] for trial in asked]
    assert drawn[0] == [0.0] * (KNOTS - 1) and any(drawn[1])


def test_two_processes_search_together_and_leave_a_policy(tmp_path):
    options = ["--steps", "10", "--pictures", "1", "--trials", "2", "--storage", str(tmp_path / "journal")]
    code = "import benchmarks.search as s; from pathlib import Path; "
    command = [sys.executable, "-c", f"{code}s.OUTPUT = Path({str(tmp_path)!r}); s.main()", *options]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal")))
    [study] = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert len(trials) == 4 and all(trial.value is not None for trial in trials)
    [file] = tmp_path.glob("*.json")
    policy = loads(file.read_bytes())
    assert len(policy.sigmas) == 10 and policy.cost <= 0.5 and any(step.cond for step in policy.steps)
