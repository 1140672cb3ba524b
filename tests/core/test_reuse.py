"""Dynamic feature reuse: eq. 5, its weights, and caches that never mix branches."""
import pytest
import torch

from fastercache_core.clock import Evaluation
from fastercache_core.reuse import ReuseCache, ReuseSettings, extrapolate, reuse_weight
from fastercache_core.schedule import Interval

PERCENT_TO_SIGMA = lambda percent: 1.0 - percent


def at(ordinal, progress=0.0):
    return Evaluation(ordinal, 1.0 - 0.1 * ordinal, progress, False)


def recorded(settings, outputs, branches):
    """A cache that recorded `outputs` (one per evaluation) at site 0."""
    cache = ReuseCache(settings, PERCENT_TO_SIGMA)
    for ordinal, output in enumerate(outputs):
        cache.begin(at(ordinal))
        cache.begin_record(at(ordinal), branches)
        cache.store(0, branches, output)
    return cache


def test_extrapolation_is_equation_5():
    newest, older = torch.tensor([3.0]), torch.tensor([1.0])
    assert extrapolate(newest, older, 0.5).item() == 4.0
    assert extrapolate(newest, older, 0.0).item() == 3.0


def test_linear_w_grows_from_zero_at_the_first_reuse_to_w_at_the_end():
    settings = ReuseSettings(weight="linear", w=1.0)
    assert reuse_weight(settings, 0.2, 0.2) == 0.0
    assert reuse_weight(settings, 0.6, 0.2) == pytest.approx(0.5)
    assert reuse_weight(settings, 1.0, 0.2) == pytest.approx(1.0)


def test_constant_and_held_w():
    assert reuse_weight(ReuseSettings(weight="constant", w=0.3), 0.9, 0.1) == 0.3
    assert reuse_weight(ReuseSettings(weight="hold", w=0.3), 0.9, 0.1) == 0.0


def test_branches_never_read_each_others_features_whatever_their_order_in_the_batch():
    cache = recorded(ReuseSettings(weight="hold"), [torch.tensor([[1.0], [2.0]])] * 2, ["cond", "uncond"])
    assert cache.recall(0, ["uncond", "cond"]).tolist() == [[2.0], [1.0]]
    assert cache.recall(0, ["cond"]).tolist() == [[1.0]]


def test_a_branch_that_was_not_recorded_or_is_stale_is_computed_first():
    cache = recorded(ReuseSettings(Interval(2), "hold"), [torch.ones(1, 1)] * 2, ["cond"])
    cache.begin(at(2))
    assert cache.may_reuse(at(2), ["cond"])
    assert not cache.may_reuse(at(2), ["cond", "uncond"])
    cache.memory.recorded["cond"] = (0,)
    assert not cache.may_reuse(at(2), ["cond"])


def test_extrapolation_waits_for_two_recordings():
    cache = recorded(ReuseSettings(Interval(2), "constant"), [torch.ones(1, 1)], ["cond"])
    cache.begin(at(1))
    assert not cache.may_reuse(at(1), ["cond"])


def test_a_stored_feature_is_a_copy_and_a_recalled_one_too():
    output = torch.ones(1, 4)
    cache = recorded(ReuseSettings(weight="hold"), [output, output], ["cond"])
    output.zero_()  # the host adds into its activations in place
    cache.recall(0, ["cond"]).zero_()
    assert torch.equal(cache.recall(0, ["cond"]), torch.ones(1, 4))


def test_memory_is_counted_and_given_back():
    cache = recorded(ReuseSettings(), [torch.ones(2, 8)] * 3, ["cond", None])
    assert sum(t.numel() for t in cache.tensors()) == 2 * 8, "two outputs of one branch"
    cache.reset()
    assert cache.tensors() == []
