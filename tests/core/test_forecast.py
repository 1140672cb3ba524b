"""Carrying a quantity forward in sigma."""
import pytest
import torch

from fastercache_core.forecast import FORECASTS, History, forecast_weights


def filled(forecast, values):
    history = History(FORECASTS[forecast])
    for sigma, value in values:
        history.push(sigma, (torch.tensor([value], dtype=torch.float64),))
    return history


@pytest.mark.parametrize("forecast, polynomial", [
    ("hold", lambda s: 3.0), ("linear", lambda s: 1 - 2 * s), ("quadratic", lambda s: 1 - 2 * s + 5 * s * s)])
def test_each_order_is_exact_on_its_own_polynomial_at_uneven_sigmas(forecast, polynomial):
    history = filled(forecast, [(s, polynomial(s)) for s in (1.0, 0.83, 0.8)])
    assert history.at(0.5).item() == pytest.approx(polynomial(0.5))


def test_blend_is_the_weighted_mean_of_its_orders():
    values = [(1.0, 4.0), (0.8, 1.0), (0.7, 3.0)]
    linear, quadratic, blend = (filled(f, values).at(0.5).item() for f in ("linear", "quadratic", "blend"))
    assert blend == pytest.approx(linear / 3 + 2 * quadratic / 3)


def test_weights_sum_to_one_so_that_a_constant_stays_what_it_is():
    for forecast in FORECASTS.values():
        assert sum(forecast_weights([0.7, 0.8, 1.0], 0.4, forecast)) == pytest.approx(1.0)


def test_a_sigma_visited_twice_keeps_only_its_newest_value():
    history = filled("linear", [(1.0, 1.0), (0.8, 2.0), (0.8, 5.0)])
    assert history.ready and history.at(0.8).item() == pytest.approx(5.0)
    assert history.at(1.0).item() == pytest.approx(1.0)


def test_not_ready_before_the_order_has_its_values_and_after_a_clear():
    history = filled("quadratic", [(1.0, 1.0), (0.9, 1.0)])
    assert not history.ready
    history.push(0.8, (torch.ones(1),))
    assert history.ready
    history.clear()
    assert not history.ready


def test_a_forecast_is_a_new_tensor():
    value = torch.ones(3)
    history = History(FORECASTS["hold"])
    history.push(1.0, (value,))
    history.at(0.9).zero_()
    assert torch.equal(value, torch.ones(3))
