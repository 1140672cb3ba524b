"""Skipping begins when forecasts have proved good, and keeps its rhythm from there."""
import pytest
import torch

from fastercache_core.clock import Clock, Evaluation
from fastercache_core.forecast import FORECASTS, History
from fastercache_core.gate import ErrorEstimate, Gate, GateSettings


def at(sigma, step):
    return Evaluation(0, sigma, 0.0, False, step)


def observed(error=1.0, nodes=(0.9, 1.0), sigma=0.8):
    """An ErrorEstimate that saw a forecast be wrong by `error` for one of two pictures."""
    estimate, history = ErrorEstimate(), History(FORECASTS["linear"])
    for node in reversed(nodes):
        history.push(node, (torch.stack([torch.full((1, 4, 4), error), torch.zeros(1, 4, 4)]),))
    estimate.observe(history, sigma, torch.zeros(2, 1, 4, 4), torch.tensor([1.0, 1.0]))
    return estimate


def test_without_settings_the_gate_is_open():
    assert Gate(None).allows([float("inf")])


def test_nothing_is_known_before_something_was_observed():
    assert not Gate(GateSettings()).allows([ErrorEstimate().effect([0.9, 1.0], at(0.8, 0.1))])


def test_it_opens_at_the_tolerance_stays_open_beyond_and_shuts_when_patience_ends():
    gate = Gate(GateSettings(tolerance=0.01, patience=4.0))
    assert [gate.allows([e]) for e in (0.02, 0.009, 0.03, 0.05, 0.03)] == [False, True, True, False, False]


def test_the_worst_picture_of_a_batch_counts():
    assert observed().effect([0.9, 1.0], at(0.8, 0.1)) == pytest.approx(0.1)


def test_an_error_grows_with_the_distance_from_what_is_known_and_with_the_step():
    estimate = observed()
    near, far = (estimate.effect([0.8, 0.9], at(sigma, 0.1)) for sigma in (0.7, 0.6))
    assert far == pytest.approx(3 * near), "(0.2 * 0.3) / (0.1 * 0.2)"
    assert estimate.effect([0.8, 0.9], at(0.7, 0.2)) == pytest.approx(2 * near)


def test_the_step_is_the_distance_to_the_next_sigma_of_the_run():
    clock = Clock([1.0, 0.8, 0.5, 0.1])
    assert [clock.tick(s).step for s in (1.0, 0.9, 0.8, 0.5)] == pytest.approx([0.2, 0.1, 0.3, 0.4])
