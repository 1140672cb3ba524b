"""Dynamic feature reuse: eq. 5, its weights, and caches that never mix branches."""

import pytest
import torch

from fastercache_core.clock import Evaluation, Interval, Window
from fastercache_core.features.gains import SUBSAMPLE, picture_elements
from fastercache_core.features.reuse import (
    PATIENCE,
    REUSE_WEIGHTS,
    ReuseCache,
    ReuseSettings,
    blend,
    extrapolate,
    planned_reuse,
    reuse_weight,
)
from fastercache_core.features.storage import StorageSettings
from fastercache_core.forecast import reachable

PERCENT_TO_SIGMA = lambda percent: 1.0 - percent
SITE = ("self", 0)


def at(ordinal, sigma=None, progress=0.0, is_last=False):
    return Evaluation(ordinal, 1.0 - 0.1 * ordinal if sigma is None else sigma, progress, is_last)


def cache_of(weight="hold", every=2, window=Window()):
    return ReuseCache(ReuseSettings({"self": Interval(every, window)}, weight), PERCENT_TO_SIGMA)


def computed(cache, ordinal, output, branches=("cond",), sigma=None):
    """One evaluation whose output at SITE is computed and stored."""
    cache.begin(at(ordinal, sigma))
    cache.begin_record(branches, {"self"})
    cache.store(SITE, branches, (output,))


def recorded(weight, outputs, branches=("cond",)):
    """A cache that recorded `outputs` (one per evaluation) at SITE."""
    cache = cache_of(weight)
    for ordinal, output in enumerate(outputs):
        computed(cache, ordinal, output, branches)
    return cache


def value(cache, branches=("cond",)):
    return cache.recall(SITE, list(branches))[0].flatten().tolist()


def test_extrapolation_is_equation_5():
    newest, older = torch.tensor([3.0]), torch.tensor([1.0])
    assert extrapolate(newest, older, 0.5).item() == 4.0
    assert extrapolate(newest, older, 0.0).item() == 3.0
    assert extrapolate(newest, older, torch.tensor(0.5)).item() == 4.0


def test_ramp_w_grows_from_zero_at_the_first_reuse_to_w_at_the_end():
    settings = ReuseSettings(weight="ramp", w=1.0)
    assert reuse_weight(settings, 0.2, 0.2) == 0.0
    assert reuse_weight(settings, 0.6, 0.2) == pytest.approx(0.5)
    assert reuse_weight(settings, 1.0, 0.2) == pytest.approx(1.0)


def test_constant_and_held_w():
    assert reuse_weight(ReuseSettings(weight="constant", w=0.3), 0.9, 0.1) == 0.3
    assert reuse_weight(ReuseSettings(weight="hold", w=0.3), 0.9, 0.1) == 0.0


def spaced(sigmas, outputs, sigma):
    """The spaced forecast at `sigma` of one number that was `outputs` at `sigmas`."""
    cache = cache_of("spaced")
    for ordinal, (at_sigma, output) in enumerate(zip(sigmas, outputs)):
        computed(cache, ordinal, torch.tensor([[output]]), sigma=at_sigma)
    cache.begin(at(len(outputs), sigma))
    return value(cache)[0]


def test_the_spaced_forecast_goes_as_far_as_sigma_does_however_uneven_the_steps_are():
    assert spaced((0.9, 0.7), (1.0, 3.0), 0.6) == pytest.approx(4.0)
    assert spaced((0.9, 0.7), (1.0, 3.0), 0.4) == pytest.approx(6.0)
    assert spaced((0.9, 0.85, 0.7), (9.0, 1.0, 3.0), 0.7) == pytest.approx(3.0), "of the two newest, to where they are"


def test_the_spaced_forecast_holds_where_the_last_two_are_too_close_together():
    """As at the second call of `heun`: what moved between them was not the step."""
    for older in (0.7, 0.7 + 1e-7, 0.72):
        assert spaced((older, 0.7), (1.0, 3.0), 0.6) == 3.0


def forecast(outputs, sigma=None):
    """The fitted forecast that follows `outputs`, one computed at every evaluation."""
    cache = recorded("fitted", outputs)
    cache.begin(at(len(outputs), sigma))
    return cache.recall(SITE, ["cond"])[0]


def noise(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_the_fitted_forecast_follows_a_straight_line_as_far_as_sigma_says():
    line = [torch.full((2, 3, 4), 1.0 + i) for i in range(4)]
    assert forecast(line).flatten().tolist() == pytest.approx([5.0] * 24, abs=1e-4)
    assert forecast(line, sigma=0.65).flatten().tolist() == pytest.approx([4.5] * 24, abs=1e-4)


def test_it_learns_to_follow_a_bend():
    bend = [torch.full((1, 8), 0.01 * i**2) for i in range(8)]
    line = 2 * bend[6] - bend[5]
    assert (forecast(bend[:7]) - bend[7]).abs().max() < 0.6 * (line - bend[7]).abs().max()


def test_it_learns_not_to_continue_noise():
    values = noise(9, (1, 4096))
    assert (forecast(values) - values[-1]).norm() < 0.7 * (values[-1] - values[-2]).norm()


def test_a_picture_is_forecast_the_same_whoever_is_beside_it():
    values, others = noise(6, (1, 64)), noise(6, (1, 64), seed=1)
    beside = forecast([torch.cat(pair) for pair in zip(values, others)])
    torch.testing.assert_close(beside[:1], forecast(values))


def test_pictures_may_lie_along_another_axis():
    cache, turned = cache_of("fitted"), cache_of("fitted")
    for ordinal, output in enumerate(noise(6, (2, 5, 3))):
        computed(cache, ordinal, output)
        turned.begin(at(ordinal))
        turned.begin_record(["cond"], {"self"})
        turned.store(SITE, ["cond"], (output.movedim(0, 2),), axis=2)
    for either in (cache, turned):
        either.begin(at(6))
    [expected], [found] = cache.recall(SITE, ["cond"]), turned.recall(SITE, ["cond"], axis=2)
    torch.testing.assert_close(found.movedim(2, 0), expected)


def test_it_is_used_only_after_a_forecast_was_compared_with_the_truth():
    for count, kinds in ((3, set()), (4, {"self"})):
        cache = recorded("fitted", [torch.ones(1, 1)] * count)
        cache.begin(at(count))
        assert cache.reusable(["cond"]) == kinds


def test_two_sigmas_that_lie_very_close_together_do_not_throw_a_feature_far_away():
    """Samplers with several calls a step evaluate nearly the same sigma twice, at different latents."""
    assert reachable((0.5, 0.5 + 1e-7, 0.6), 0.4) == [0, 2]
    assert reachable((0.5, 0.5, 0.5), 0.4) == [0]
    cache, sigmas = cache_of("fitted"), (0.8, 0.8, 0.6, 0.6 - 1e-7)
    for ordinal, (sigma, output) in enumerate(zip(sigmas, (1.0, 1.1, 1.4, 1.5))):
        computed(cache, ordinal, torch.tensor([[output]]), sigma=sigma)
    cache.begin(at(4, sigma=0.5))
    assert 1.5 <= value(cache)[0] <= 1.8


def test_blending_loses_nothing_in_small_dtypes():
    """Weights of the outputs themselves, rounded to the dtype, would not sum to one."""
    output = torch.rand(1, 1000).to(torch.bfloat16)
    assert torch.equal(blend([output] * 3, torch.tensor([[0.713, -0.238]]), 0), output)


def test_gains_are_fitted_to_a_sample_of_a_large_feature():
    x = torch.arange(8.0 * SUBSAMPLE).reshape(8, 1024, -1)
    part = picture_elements(x, 0)
    assert part.shape[0] == 8 and SUBSAMPLE / 2 <= part.numel() <= 2 * SUBSAMPLE
    assert len(set((part.long() % x.shape[-1]).flatten().tolist())) == x.shape[-1], "of every channel"
    assert picture_elements(torch.ones(3, 4), 1).shape == (4, 3)


def test_branches_never_read_each_others_features_whatever_their_order_in_the_batch():
    cache = recorded("hold", [torch.tensor([[1.0], [2.0]])] * 2, ["cond", "uncond"])
    assert value(cache, ["uncond", "cond"]) == [2.0, 1.0]
    assert value(cache) == [1.0]


def test_the_batch_may_lie_along_another_axis():
    cache = cache_of()
    cache.begin(at(0))
    cache.begin_record(["cond", "uncond"], {"self"})
    cache.store(SITE, ["cond", "uncond"], (torch.tensor([[1.0, 1.0, 2.0, 2.0]]),), axis=1)
    assert cache.recall(SITE, ["uncond", "cond"], axis=1)[0].tolist() == [[2.0, 2.0, 1.0, 1.0]]


def test_what_cannot_be_cut_into_branches_is_not_stored():
    cache = recorded("hold", [torch.ones(3, 4)], ["cond", "uncond"])
    assert not cache.holds(SITE, ["cond"])


def test_a_branch_that_was_not_recorded_or_is_stale_is_computed_first():
    cache = recorded("hold", [torch.ones(1, 1)] * 2)
    cache.begin(at(2))
    assert cache.reusable(["cond"]) == {"self"}
    assert cache.reusable(["cond", "uncond"]) == set()
    cache.begin(at(3))
    cache.begin_record(["uncond"], {"self"})
    cache.begin(at(4))
    assert cache.due == {"self"} and cache.reusable(["cond"]) == set()


def test_extrapolation_waits_for_two_recordings():
    cache = recorded("constant", [torch.ones(1, 1)])
    cache.begin(at(1))
    assert cache.reusable(["cond"]) == set()


def test_features_are_reused_up_to_their_age_inside_their_window_and_never_at_the_end():
    cache = cache_of(every=3, window=Window(0.2, 0.6))
    computed(cache, 0, torch.ones(1, 1))
    for ordinal, sigma, due in ((1, 0.9, set()), (1, 0.8, {"self"}), (2, 0.5, {"self"}), (3, 0.5, set())):
        cache.begin(at(ordinal, sigma))
        assert cache.due == cache.reusable(["cond"]) == due, (ordinal, sigma)
    computed(cache, 4, torch.ones(1, 1), sigma=0.5)
    cache.begin(at(5, 0.5, is_last=True))
    assert cache.reusable(["cond"]) == set()


def test_planned_features_may_be_of_any_age():
    cache = ReuseCache(planned_reuse(), PERCENT_TO_SIGMA)
    cache.begin(at(0))
    cache.begin_record(["cond"], {"branch"})
    cache.store(("branch", 0), ["cond"], (torch.ones(1, 1),))
    cache.begin(at(500, sigma=0.5))
    assert cache.reusable(["cond"]) == {"branch"}
    assert cache.recall(("branch", 0), ["cond"])[0].item() == 1.0


def test_a_past_that_is_too_old_is_not_continued():
    """A window of a long video that comes back later starts anew, and takes no memory until then."""
    cache = recorded("constant", [torch.ones(1, 1), torch.ones(1, 1)])
    cache.begin(at(1 + PATIENCE * 2))
    assert cache.tensors()
    cache.begin(at(2 + PATIENCE * 2))
    assert cache.tensors() == [] and cache.memory.last_recorded() == {}


def test_past_its_window_a_kind_takes_no_memory():
    cache = cache_of(window=Window(0.0, 0.35))
    computed(cache, 0, torch.ones(1, 1))
    computed(cache, 3, torch.ones(1, 1), sigma=0.7)
    assert cache.to_store() == {"self"} and cache.tensors()
    cache.begin(at(4, sigma=0.6))
    assert cache.to_store() == set() and cache.tensors() == []


def test_nothing_is_stored_at_the_last_evaluation():
    cache = cache_of()
    cache.begin(at(9, is_last=True))
    assert cache.to_store() == set()


def test_a_stored_feature_is_a_copy_and_a_recalled_one_too():
    output = torch.ones(1, 4)
    for weight in REUSE_WEIGHTS:
        cache = recorded(weight, [output.fill_(1.0)] * 3)
        output.zero_()  # the host adds into its activations in place
        cache.recall(SITE, ["cond"])[0].zero_()
        assert value(cache) == [1.0] * 4


def test_memory_is_counted_and_given_back():
    cache = recorded("fitted", [torch.ones(2, 8)] * 4, ["cond", None])
    assert sum(t.numel() for t in cache.memory.tensors()) == 3 * 8, "three outputs of one branch"
    assert cache.gains.tensors()
    cache.reset()
    assert cache.tensors() == []
    cache.begin(at(4))
    assert cache.reusable(["cond"]) == set()


def budgeted(budget, dtype="native"):
    """A cache of fitted forecasts that ran six evaluations of two branches at four sites, two pictures each."""
    cache = ReuseCache(
        ReuseSettings({"self": Interval(2)}, "fitted", storage=StorageSettings(budget, None, dtype)), PERCENT_TO_SIGMA
    )
    branches, sites = ["cond", "uncond"], [("self", i) for i in range(4)]
    for ordinal in range(6):
        cache.begin(at(ordinal))
        cache.begin_record(branches, {"self"})
        for site in sites:
            cache.store(site, branches, (torch.rand(4, 5, 8), None))
            assert budget is None or held_bytes(cache) <= budget, "at no moment"
        for site in sites:
            if cache.holds(site, branches):
                cache.recall(site, branches)
            assert budget is None or held_bytes(cache) <= budget, "nor when gains are fitted"
    return cache


def held_bytes(cache):
    """Bytes of the memory that the tensors of a cache keep, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors()}.values())


@pytest.mark.parametrize("dtype", ["native", "fp16", "fp8"])
def test_the_gains_of_fitted_forecasts_are_in_the_budget_to_the_byte(dtype):
    every = budgeted(None, dtype)
    needed = every.memory.plan()["bytes"]
    assert needed == held_bytes(every)
    assert budgeted(needed, dtype).memory.plan() == {"sites": 4, "of": 4, "bytes": needed}
    assert budgeted(needed - 1, dtype).memory.plan() == {"sites": 3, "of": 4, "bytes": needed * 3 // 4}


def test_room_can_be_promised_to_all_branches_for_what_one_of_them_gives():
    cache = cache_of("fitted")
    cache.begin(at(0))
    cache.promise(SITE, ["cond", "uncond"], (torch.empty(3, 2, 8, device="meta"), None), 3)
    one = 3 * 2 * 8 * 4 + 1 * (9 + 2) * 4  # outputs, tokens, width, bytes; gains of a picture
    assert cache.memory.plan() == {"sites": 1, "of": 1, "bytes": 2 * one}
    assert cache.tensors() == [], "nothing is held for it"
    cache.promise(("self", 1), ["cond"], (torch.empty(4, 2, 8, device="meta"),), 3)
    assert cache.memory.plan()["of"] == 1, "what cannot be cut into branches is not stored"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_forecast_has_the_features_own_dtype(dtype):
    outputs = [torch.full((1, 4), float(i), dtype=dtype) for i in range(4)]
    cache = recorded("fitted", outputs)
    cache.begin(at(4))
    [forecast] = cache.recall(SITE, ["cond"])
    assert forecast.dtype == dtype and torch.allclose(forecast.float(), torch.full((1, 4), 4.0), rtol=0.02)
