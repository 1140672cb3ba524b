"""Cached features within a budget: who has room, what is forgotten, and what counts as known."""
import pytest
import torch

from fastercache_core.memory import FeatureMemory
from fastercache_core.storage import StorageSettings

SITES = [("self", i) for i in range(4)]


def memory(budget=None, depth=2, dtype="native"):
    return FeatureMemory(StorageSettings(budget=budget, dtype=dtype), depth)


def evaluated(held, ordinal, branches=("cond",), sites=SITES, value=None, size=8):
    """One evaluation: every site is recorded for every branch in one batch."""
    for branch in branches:
        held.record(branch, "self", ordinal)
    for site in sites:
        feature = (torch.full((1, size), float(ordinal if value is None else value)), None)
        held.store(site, dict.fromkeys(branches, feature), sigma=1.0 - 0.1 * ordinal)
        if held.budget is not None:
            assert held_bytes(held) <= held.budget, "at no moment"


def held_bytes(held):
    return sum(t.numel() * t.element_size() for t in held.tensors())


def test_the_newest_outputs_come_first_with_their_sigmas():
    held = memory()
    for ordinal in range(3):
        evaluated(held, ordinal)
    [[(s0, (newest, none)), (s1, (older, _))]] = held.recall(["cond"], SITES[0])
    assert (s0, s1) == (pytest.approx(0.8), pytest.approx(0.9)) and none is None
    assert newest[0, 0] == 2 and older[0, 0] == 1


@pytest.mark.parametrize("dtype", ["native", "fp16", "fp8"])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_promised_is_what_is_held_in_the_end(depth, dtype):
    held = memory(depth=depth, dtype=dtype)
    for ordinal in range(4):
        evaluated(held, ordinal, ["cond", "uncond"])
    assert held.plan() == {"sites": 4, "of": 4, "bytes": held_bytes(held)}


@pytest.mark.parametrize("rooms", [0, 1, 3, 4])
def test_the_first_sites_get_the_room_and_the_others_none(rooms):
    one = 2 * 2 * 8 * 4  # depth, branches, numbers, bytes of one
    held = memory(budget=rooms * one + one - 1 if rooms < 4 else 4 * one)
    for ordinal in range(3):
        evaluated(held, ordinal, ["cond", "uncond"])
    assert held.plan() == {"sites": rooms, "of": 4, "bytes": rooms * one}
    assert [held.holds(["cond", "uncond"], site) for site in SITES] == [i < rooms for i in range(4)]
    assert held.ready("cond", "self", since=2) == (rooms > 0)


def test_a_batch_gets_room_for_all_of_its_branches_or_for_none():
    """Half of a batch cannot be left out of a pass."""
    held = memory(budget=3 * 2 * 8 * 4)  # three features, of four
    for ordinal in range(2):
        evaluated(held, ordinal, ["cond", "uncond"], SITES[:2])
    assert held.holds(["cond", "uncond"], SITES[0])
    assert not held.holds(["cond"], SITES[1]) and not held.holds(["uncond"], SITES[1])


def test_a_branch_with_room_is_kept_up_to_date_beside_one_without():
    held = memory(budget=2 * 8 * 4)
    evaluated(held, 0, ["cond"], SITES[:1])
    evaluated(held, 1, ["uncond"], SITES[:1])
    evaluated(held, 2, ["cond", "uncond"], SITES[:1])
    assert held.holds(["cond"], SITES[0]) and not held.holds(["uncond"], SITES[0])
    assert held.recall(["cond"], SITES[0])[0][0][1][0][0, 0] == 2


def test_a_site_that_did_not_run_when_its_kind_was_recorded_is_not_known():
    """Another node may take a block's place for some evaluations: what the block gave before is old."""
    held = memory()
    evaluated(held, 0)
    evaluated(held, 1)
    evaluated(held, 2, sites=SITES[1:])
    assert not held.holds(["cond"], SITES[0]) and held.holds(["cond"], SITES[1])


def test_what_is_forgotten_makes_room():
    held = memory(budget=2 * 8 * 4)
    for ordinal in range(2):
        evaluated(held, ordinal, ["cond"], SITES[:1])
    evaluated(held, 2, ["uncond"], SITES[:1])
    assert not held.holds(["uncond"], SITES[0])
    held.forget(lambda branch, kind: True)
    assert held.tensors() == [] and held.plan() == {"sites": 0, "of": 0, "bytes": 0}
    for ordinal in (3, 4):
        evaluated(held, ordinal, ["uncond"], SITES[:1])
    assert held.holds(["uncond"], SITES[0])


def test_forgetting_one_branch_leaves_the_others():
    held = memory()
    for ordinal in range(2):
        evaluated(held, ordinal, ["cond", "uncond"])
    held.forget(lambda branch, kind: branch == "cond")
    assert not held.holds(["cond"], SITES[0]) and held.holds(["uncond"], SITES[0])
    assert not held.ready("cond", "self", 0) and held.ready("uncond", "self", 0)


def test_the_next_site_of_the_kind_is_brought_back_for_the_whole_batch():
    held, coming = memory(), []
    for ordinal in range(2):
        for kind, site in (("self", SITES[0]), ("cross", ("cross", 0)), ("self", SITES[1])):
            for branch in ("cond", "uncond"):
                held.record(branch, kind, ordinal)
            held.store(site, {b: (torch.full((1, 2), float(len(site[0])) + site[1]),) for b in ("cond", "uncond")}, 0.5)
    held.storage.expect = lambda stored: coming.append(stored.data[0, 0].item())
    held.recall(["uncond", "cond"], SITES[0])
    following = [value for value in coming if value != 4.0]  # its own are asked for as well
    assert following == [5.0] * 4, "two outputs of two branches of self 1, nothing of cross 0"
