"""Carrying a quantity forward in sigma: polynomials, fitted polynomials, and hedged ones."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fastercache_core.bands import split
from fastercache_core.forecast import (
    FADES,
    FORECASTERS,
    ORDERS,
    REACH_LATENT,
    WEIGHED_EDGES,
    Fitted,
    Forecaster,
    Hedged,
    Polynomial,
    make_forecaster,
    polynomial_weights,
    reachable,
)

Path = Callable[[float], Tensor]
SIGMAS = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65]
TENTHS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


def random_fields(count: int, batch: int = 1) -> Tensor:
    return torch.randn(count, batch, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


FIELD, OTHER = random_fields(2)


def observed(forecaster: Forecaster, path: Path | Mapping[float, Tensor], sigmas: Iterable[float]) -> Forecaster:
    for sigma in sigmas:
        forecaster.observe(sigma, path[sigma] if isinstance(path, Mapping) else path(sigma))
    return forecaster


def of_values(name: str, values: Mapping[float, float] | list[tuple[float, float]]) -> Forecaster:
    """A polynomial through numbers: {sigma: number}."""
    forecaster = Polynomial(ORDERS[name])
    for sigma, value in values.items() if isinstance(values, Mapping) else values:
        forecaster.observe(sigma, torch.tensor([value], dtype=torch.float64))
    return forecaster


def error(forecaster: Forecaster, path: Path, sigma: float) -> float:
    return (forecaster.predict(sigma) - path(sigma)).norm().item()


def ready(forecaster: Forecaster) -> bool:
    return len(forecaster.nodes) == forecaster.depth


# All forecasters


@pytest.mark.parametrize("name", FORECASTERS)
def test_a_forecast_is_a_new_tensor_and_values_are_never_written(name: str) -> None:
    forecaster, given = make_forecaster(name, (0.2,)), {sigma: FIELD * sigma for sigma in TENTHS}
    before = {sigma: value.clone() for sigma, value in given.items()}
    observed(forecaster, given, TENTHS).predict(0.4).zero_()
    forecaster.predict(0.4, onto=given[0.5], scale=torch.full((1, 1, 1, 1), 2.0)).zero_()
    assert all(torch.equal(given[sigma], before[sigma]) for sigma in TENTHS)
    assert forecaster.predict(0.4).norm() > 0


@pytest.mark.parametrize("name", FORECASTERS)
def test_a_constant_stays_what_it_is(name: str) -> None:
    assert torch.allclose(observed(make_forecaster(name, (0.2,)), lambda s: FIELD, TENTHS).predict(0.4), FIELD)


@pytest.mark.parametrize("name", FORECASTERS)
def test_it_is_added_to_what_is_given_at_the_scale_of_each_picture(name: str) -> None:
    both = torch.cat([FIELD, OTHER])
    forecaster = observed(make_forecaster(name, (0.2,)), lambda s: both * s, TENTHS)
    onto, scale = both.flip(0), torch.tensor([2.0, -3.0]).reshape(2, 1, 1, 1)
    assert torch.allclose(forecaster.predict(0.4, onto, scale), onto + scale * forecaster.predict(0.4))


@pytest.mark.parametrize("name", FORECASTERS)
def test_weights_can_be_given_for_the_newest_values(name: str) -> None:
    forecaster = observed(make_forecaster(name, (0.2,)), lambda s: FIELD * s, TENTHS)
    count = len(forecaster.nodes)
    assert torch.allclose(forecaster.predict(0.4, values=(3.0,)), FIELD * 0.5 * 3.0), "fewer weights than values"
    expected = sum((i + 1) * sigma for i, sigma in enumerate(forecaster.nodes)) * FIELD
    assert torch.allclose(forecaster.predict(0.4, values=[i + 1.0 for i in range(count)]), expected)


def test_the_weights_of_a_policy_are_those_of_every_value_and_band() -> None:
    forecaster = observed(make_forecaster("weighed", ()), lambda s: FIELD * s, TENTHS)
    low, *middle, high = split(FIELD, WEIGHED_EDGES)
    newest, before = forecaster.nodes[:2]
    expected = (2.0 * newest + before) * low + 3.0 * newest * high
    none = [0.0] * len(middle)
    weights = [2.0, *none, 3.0, 1.0, *none, 0.0]
    assert torch.allclose(forecaster.predict(0.4, values=weights), expected, atol=1e-6)
    assert len(forecaster.nodes) > 3, "more values than a polynomial uses"


@pytest.mark.parametrize("name", FORECASTERS)
def test_it_holds_the_newest_values_and_forgets_when_told(name: str) -> None:
    forecaster = observed(make_forecaster(name, (0.2,)), lambda s: FIELD * s, TENTHS)
    assert forecaster.nodes == [*reversed(TENTHS)][: forecaster.depth] and ready(forecaster) and forecaster.tensors()
    for sigma, value in zip(forecaster.nodes, forecaster.values()):
        assert torch.allclose(value.sum(0), FIELD * sigma)
    forecaster.clear()
    assert forecaster.nodes == [] and forecaster.values() == [] and forecaster.tensors() == []
    forecaster.observe(1.0, OTHER)
    assert torch.allclose(forecaster.predict(0.5), OTHER), "nothing of what was seen before is left"


@pytest.mark.parametrize("name", FORECASTERS)
def test_no_picture_depends_on_its_neighbours(name: str) -> None:
    smooth, rough = (lambda s: FIELD * s), (lambda s: OTHER * (-1) ** round(s * 10))
    both = observed(make_forecaster(name, (0.2,)), lambda s: torch.cat([smooth(s), rough(s)]), TENTHS)
    for i, path in enumerate((smooth, rough)):
        alone = observed(make_forecaster(name, (0.2,)), path, TENTHS)
        assert torch.allclose(both.predict(0.4)[i : i + 1], alone.predict(0.4))


@pytest.mark.parametrize("name", FORECASTERS)
def test_a_sigma_visited_twice_keeps_only_its_newest_value(name: str) -> None:
    forecaster = make_forecaster(name, (0.2,))
    for sigma, value in ((1.0, FIELD), (1.0, FIELD), (0.9, OTHER), (0.9, FIELD), (0.8, OTHER), (0.8, FIELD)):
        forecaster.observe(sigma, value)
    assert len({*forecaster.nodes}) == len(forecaster.nodes)
    assert all(torch.allclose(value.sum(0), FIELD) for value in forecaster.values())
    assert forecaster.predict(0.7).isfinite().all()


@pytest.mark.parametrize("name", FORECASTERS)
def test_a_packed_latent_is_one_band(name: str) -> None:
    """Newer hosts join video and audio in one tensor [batch, 1, elements], which has no picture plane."""
    path = lambda s: torch.cat([FIELD, OTHER]) * math.cos(3 * s)
    packed = observed(make_forecaster(name, (0.2, 0.3)), lambda s: path(s).reshape(2, 1, -1), TENTHS)
    plane = observed(make_forecaster(name, ()), path, TENTHS)
    assert packed.predict(0.4).shape == (2, 1, FIELD.numel())
    assert torch.allclose(packed.predict(0.4).reshape(2, *FIELD.shape[1:]), plane.predict(0.4))


# Small dtypes: sums are made in float32

WAN = (1, 16, 21, 60, 104)  # latent of 81 frames at 832 x 480


def in_dtype(name: str, edges: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A forecast of a latent of Wan's size from values in `dtype`, and that from the same values in float32."""
    a, b = torch.randn(2, *WAN, generator=torch.Generator().manual_seed(0))
    forecasters = [make_forecaster(name, edges) for _ in range(2)]
    for sigma in (1.0, 0.9, 0.8, 0.7, 0.6):
        value = (a * math.cos(3 * sigma) + b * sigma**2).to(dtype)
        forecasters[0].observe(sigma, value)
        forecasters[1].observe(sigma, value.float())
    small, whole = (forecaster.predict(0.5) for forecaster in forecasters)
    return small, whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORECASTERS)
def test_forecasts_of_large_latents_in_small_dtypes_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    small, whole = in_dtype(name, (), dtype)
    assert small.dtype == dtype and small.isfinite().all()
    assert (small.float() - whole).norm() < 0.5 * torch.finfo(dtype).eps * whole.norm(), "rounding of the result alone"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["fitted", "hedged"])
def test_in_bands_they_differ_by_no_more_than_rounding_of_the_bands(name: str, dtype: torch.dtype) -> None:
    small, whole = in_dtype(name, (0.2,), dtype)
    assert (small.float() - whole).norm() < 2 * torch.finfo(dtype).eps * whole.norm()


# Polynomials


@pytest.mark.parametrize(
    "name, polynomial",
    [("hold", lambda s: 3.0), ("linear", lambda s: 1 - 2 * s), ("quadratic", lambda s: 1 - 2 * s + 5 * s * s)],
)
def test_each_order_is_exact_on_its_own_polynomial_at_uneven_sigmas(
    name: str, polynomial: Callable[[float], float]
) -> None:
    forecaster = of_values(name, {s: polynomial(s) for s in (1.0, 0.88, 0.8)})
    assert forecaster.predict(0.5).item() == pytest.approx(polynomial(0.5))


def test_blend_is_the_weighted_mean_of_its_orders() -> None:
    values = {1.0: 4.0, 0.8: 1.0, 0.7: 3.0}
    linear, quadratic, blend = (
        of_values(name, values).predict(0.5).item() for name in ("linear", "quadratic", "blend")
    )
    assert blend == pytest.approx(linear / 3 + 2 * quadratic / 3)


def test_weights_sum_to_one() -> None:
    for orders in ORDERS.values():
        assert sum(polynomial_weights([0.7, 0.8, 1.0], 0.4, orders)) == pytest.approx(1.0)


def test_a_line_through_a_sigma_visited_twice_passes_through_its_newest_value() -> None:
    forecaster = of_values("linear", [(1.0, 1.0), (0.8, 2.0), (0.8, 5.0)])
    assert ready(forecaster) and forecaster.predict(0.8).item() == pytest.approx(5.0)
    assert forecaster.predict(1.0).item() == pytest.approx(1.0)


def test_bands_have_weights_of_their_own_where_the_caller_gives_them() -> None:
    forecaster = make_forecaster("hold", (0.2,), weighs_bands=True)
    forecaster.observe(1.0, FIELD)
    low, high = split(FIELD, (0.2,))
    assert torch.allclose(forecaster.predict(0.9, bands=(2.0, 0.5)), 2 * low + 0.5 * high)


# How far a polynomial goes


def test_a_polynomial_goes_as_far_as_its_reach_allows() -> None:
    near = reachable([0.9, 1.0], 0.9 - REACH_LATENT * 0.1 + 1e-6, REACH_LATENT)
    far = reachable([0.9, 1.0], 0.9 - REACH_LATENT * 0.1 - 1e-3, REACH_LATENT)
    assert (near, far) == ([0, 1], [0])


def test_of_values_close_together_one_is_taken_and_an_older_one_farther_away_serves() -> None:
    assert reachable([0.8, 0.8001, 0.9], 0.7) == [0, 2]
    assert reachable([0.8, 0.8, 0.8], 0.7) == [0], "the same sigma again and again"


@pytest.mark.parametrize("name", ["linear", "quadratic", "blend", "fitted", "hedged"])
def test_noise_between_values_close_together_is_not_carried_over_a_long_way(name: str) -> None:
    """Grids are dense at one end: from steps of 0.0005 a line to a point 0.2 away multiplies noise by 400."""
    noise = 0.01 * torch.randn(5, *FIELD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    forecaster = make_forecaster(name, (0.2,))
    for i, part in enumerate(noise):
        forecaster.observe(1 - 0.0005 * i, FIELD + part)
    assert (forecaster.predict(0.8) - FIELD).norm() < 0.05 * FIELD.norm()


@pytest.mark.parametrize("name", ["linear", "quadratic", "blend", "fitted"])
def test_gaps_of_four_even_steps_are_within_reach(name: str) -> None:
    path = lambda s: FIELD * s + OTHER
    forecaster = observed(make_forecaster(name, (0.2,)), path, [1.0, 0.95, 0.9, 0.85, 0.8])
    assert error(forecaster, path, 0.6) < 0.05 * error(observed(Polynomial(ORDERS["hold"]), path, [0.8]), path, 0.6)


# Fitted


def test_a_smooth_quantity_is_followed_better_than_by_holding_it() -> None:
    path = lambda s: FIELD * s + OTHER * s**2
    held, fitted = observed(Polynomial(ORDERS["hold"]), path, SIGMAS), observed(Fitted(), path, SIGMAS)
    assert error(fitted, path, 0.6) < 0.1 * error(held, path, 0.6)


def test_where_the_past_says_nothing_the_forecast_falls_back_towards_holding() -> None:
    """Independent values: any extrapolation is worse than none, and the gains find that out."""
    values = dict(zip([*SIGMAS, 0.6], random_fields(9)))
    quadratic, fitted = (
        error(observed(forecaster, values, SIGMAS), values.__getitem__, 0.6)
        for forecaster in (Polynomial(ORDERS["quadratic"]), Fitted())
    )
    assert fitted < 0.5 * quadratic


def test_what_was_learned_before_still_counts() -> None:
    """After a rough past, one forecast that fits is followed less far than by a run that knows nothing else."""
    rough = [*random_fields(8)]
    smooth = [FIELD * sigma for sigma in (0.64, 0.63, 0.62, 0.61)]
    sigmas = [*SIGMAS, 0.64, 0.63, 0.62, 0.61]
    long = observed(Fitted(), dict(zip(sigmas, [*rough, *smooth])), sigmas)
    short = observed(Fitted(), dict(zip(sigmas[8:], smooth)), sigmas[8:])
    moved_long, moved_short = ((f.predict(0.6) - f.values()[0]).norm() for f in (long, short))
    assert moved_long < 0.9 * moved_short


def test_each_band_has_its_own_gains() -> None:
    smooth, rough = torch.ones(1, 1, 16, 16, dtype=torch.float64), random_fields(8)[:, :, :1]
    high = dict(zip(SIGMAS, (r - split(r, (0.2,))[0] for r in rough)))
    forecaster = observed(Fitted((0.2,)), lambda s: smooth * s + high[s], SIGMAS)
    low = forecaster.predict(0.6, bands=(1.0, 0.0))
    assert torch.allclose(low, smooth * 0.6, atol=1e-6), "the rough band must not spoil the smooth one"


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_any_number_of_bands_adds_up_to_the_whole(bands: int) -> None:
    edges = [0.2 + 0.05 * i for i in range(bands - 1)]
    assert torch.allclose(observed(Fitted(edges), lambda s: FIELD, TENTHS).predict(0.4), FIELD)


def test_it_waits_for_three_values() -> None:
    forecaster = observed(Fitted(), lambda s: torch.ones(1, 1, 4, 4), SIGMAS[:2])
    assert not ready(forecaster)
    forecaster.observe(SIGMAS[2], torch.ones(1, 1, 4, 4))
    assert ready(forecaster) and forecaster.predict(0.5).mean().item() == pytest.approx(1.0)


# Hedged


def feedback(forecaster: Forecaster, answer: float, gap: int, steps: int = 60) -> float:
    """How far a run ends from the full one where a quantity answers to the latent's error, `answer` times as much.

    One value in `gap` is computed, the others are predicted; the latent moves by what was predicted.
    """
    off = torch.zeros_like(FIELD)
    for step in range(steps):
        sigma = 1 - step / steps
        full = FIELD * math.cos(3 * sigma) + OTHER * math.sin(5 * sigma)
        if step % gap and step > 1:
            value = forecaster.predict(sigma)
        else:
            value = full - answer * off
            forecaster.observe(sigma, value)
        off = off + (value - full) / steps
    return (off.norm() / FIELD.norm()).item()


def test_what_moves_evenly_is_followed_along_its_way() -> None:
    path = lambda s: FIELD * s + OTHER
    held = observed(Polynomial(ORDERS["hold"]), path, TENTHS)
    assert error(observed(Hedged(), path, TENTHS), path, 0.4) < 0.2 * error(held, path, 0.4)


@pytest.mark.parametrize("gap, answer", [(3, 60), (4, 40)])
def test_what_answers_to_its_own_errors_does_not_swing_up(gap: int, answer: float) -> None:
    """So does the difference between branches at a high cfg, and every polynomial breaks on it."""
    hedged, fitted = feedback(Hedged(), answer, gap), feedback(Fitted(), answer, gap)
    assert hedged < 0.1 < 1 < fitted


@pytest.mark.parametrize("gap", [2, 3, 4])
def test_what_answers_little_is_followed_better_than_by_holding_it(gap: int) -> None:
    assert feedback(Hedged(), 5, gap) < 0.3 * feedback(Polynomial(ORDERS["hold"]), 5, gap)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_what_fades_is_taken_to_fade_on_by_half_as_much(share: float) -> None:
    forecaster = observed(Hedged(), lambda s: FIELD * share ** (10 * (1 - s)), TENTHS[:2])
    assert torch.allclose(forecaster.predict(0.8), FIELD * share * share**FADES)
    assert torch.allclose(forecaster.predict(0.85), FIELD * share * share ** (FADES / 2)), "by the way in sigma"


def test_what_grows_is_not_taken_to_grow_on() -> None:
    forecaster = observed(Hedged(), lambda s: FIELD * (2 - s), TENTHS[:2])
    assert torch.allclose(forecaster.predict(0.8), FIELD * 1.1)


def test_what_fades_does_not_grow_where_sigma_turns_back() -> None:
    """A sampler may start again at a higher sigma: fading is not run backwards."""
    forecaster = observed(Hedged(), lambda s: FIELD * 0.1 ** (10 * (1 - s)), TENTHS[:2])
    assert forecaster.predict(1.5).norm() <= (1 + 1e-6) * forecaster.values()[0].norm()


def test_before_anything_was_compared_the_only_value_is_held() -> None:
    assert torch.allclose(observed(Hedged(), lambda s: FIELD, TENTHS[:1]).predict(0.5), FIELD)


def test_a_band_that_fades_leaves_the_others_alone() -> None:
    low, high = split(FIELD, (0.2,))
    forecaster = observed(Hedged((0.2,)), {1.0: low + high, 0.9: low + high * 0.25}, [1.0, 0.9])
    assert torch.allclose(forecaster.predict(0.8), low + high * 0.25 * 0.25**FADES)


def test_an_empty_band_and_an_empty_picture_do_no_harm() -> None:
    flat = FIELD.flatten(2)  # without a picture plane the high band is empty
    assert torch.allclose(observed(Hedged((0.2,)), lambda s: flat, [1.0, 0.9, 0.8]).predict(0.7), flat)
    nothing = observed(Hedged((0.2,)), lambda s: torch.zeros_like(FIELD), TENTHS)
    assert not nothing.predict(0.4).any()
