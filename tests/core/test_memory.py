"""Cached features within a budget: who has room, what is forgotten, and what counts as known."""

import pytest
import torch

from fastercache_core.features.memory import FeatureMemory
from fastercache_core.features.storage import StorageSettings
from support.elsewhere import Elsewhere, no_gpu

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
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_promised_is_what_is_held_in_the_end(depth, dtype):
    held = memory(depth=depth, dtype=dtype)
    for ordinal in range(4):
        evaluated(held, ordinal, ["cond", "uncond"])
    assert held.plan() == {"sites": 4, "of": 4, "bytes": held_bytes(held)}


def moving(dtype, count, change=0.1):
    """Values of a feature that change by a tenth from one to the next, oldest first."""
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(2, 5, 64, generator=generator) * torch.tensor([0.0, 0.01, 1.0, 30.0, 400.0])[:, None]]
    for _ in range(count - 1):
        values.append(values[-1] * (1 + change * torch.randn(2, 5, 64, generator=generator)))
    return [value.to(dtype) for value in values]


def kept_of(values, depth, at_rest):
    """What is recalled of `values` (oldest first), newest first."""
    held = memory(depth=depth, dtype=at_rest)
    for ordinal, value in enumerate(values):
        held.record("cond", "self", ordinal)
        held.store(SITES[0], {"cond": (value,)}, 1.0 - 0.1 * ordinal)
    return [feature[0] for _, feature in held.recall(["cond"], SITES[0])[0]]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fp8_keeps_the_newest_output_in_16_bits_and_errs_by_a_share_of_the_changes_in_others(dtype, depth):
    """Also after the newest has become older many times."""
    values = moving(dtype, 7)
    newest, *older = kept_of(values, depth, "fp8")
    assert (newest.double() - values[-1].double()).abs().le(values[-1].abs() * 2**-11 + 2**-25).all()
    allowed, after = torch.zeros_like(newest, dtype=torch.float64), values[-1]
    for kept, value in zip(older, values[-2::-1]):
        change, size = (after.double() - value.double()).abs(), torch.maximum(after.abs(), value.abs()).double()
        allowed += (
            change * (2**-4 + 2**-7)
            + change.amax(-1, keepdim=True) * 2**-18
            + size * (2**-10 + 2 * torch.finfo(dtype).eps)
            + 2**-24
        )
        assert ((kept.double() - value.double()).abs() <= allowed).all()
        assert kept.dtype == dtype
        after = value


def test_a_straight_line_is_continued_from_fp8_nearly_as_well_as_from_what_was_put():
    """Kept in fp8 alone, every number would be wrong by 2.6 percent, twice."""
    values = moving(torch.float32, 2)
    newest, older = kept_of(values, 2, "fp8")
    forecast, true = 2 * newest - older, 2 * values[1] - values[0]
    assert (forecast - true).norm() < 0.004 * true.norm()


def test_a_feature_that_comes_in_another_shape_starts_anew_and_is_promised_its_own_room():
    held = memory(budget=2 * 8 * 4)
    for size in (4, 4, 8, 8):
        feature = {"cond": (torch.ones(1, size), None)}
        held.record("cond", "self", size)
        held.forget_other_shapes(SITES[0], feature)
        assert held.has_past("cond", SITES[0]) == (len(held.tensors()) == 2)
        held.store(SITES[0], feature, 0.5)
        assert {t.numel() for t in held.tensors()} == {size} and held_bytes(held) <= held.budget
    assert held.plan() == {"sites": 1, "of": 1, "bytes": 64} and held_bytes(held) == 64


@pytest.mark.parametrize("rooms", [0, 1, 3, 4])
def test_the_first_sites_get_the_room_and_the_others_none(rooms):
    one = 2 * 2 * 8 * 4  # depth, branches, numbers, bytes of one
    held = memory(budget=rooms * one + one - 1 if rooms < 4 else 4 * one)
    for ordinal in range(3):
        evaluated(held, ordinal, ["cond", "uncond"])
    assert held.plan() == {"sites": rooms, "of": 4, "bytes": rooms * one}
    assert held.has_room() == (rooms == 4)
    assert [held.holds(["cond", "uncond"], site) for site in SITES] == [i < rooms for i in range(4)]
    assert held.ready("cond", "self", since=2) == (rooms > 0)


def test_a_batch_gets_room_for_all_of_its_branches_or_for_none():
    """Half of a batch cannot be left out of a pass."""
    held = memory(budget=3 * 2 * 8 * 4)  # three features, of four
    for ordinal in range(2):
        evaluated(held, ordinal, ["cond", "uncond"], SITES[:2])
    assert held.holds(["cond", "uncond"], SITES[0])
    assert not held.holds(["cond"], SITES[1]) and not held.holds(["uncond"], SITES[1])
    assert not held.has_room() and not memory().has_room()


def features(size, branches=("cond", "uncond")):
    return dict.fromkeys(branches, (torch.ones(1, size), None))


def test_what_was_foreseen_has_its_room_when_it_comes_and_no_more_than_that():
    held = memory(budget=2 * 2 * 8 * 4 * 2)  # two sites of two branches, two outputs of eight numbers
    for site in SITES:
        held.promise(site, features(8))
    assert held.plan() == {"sites": 2, "of": 4, "bytes": held.budget} and held.tensors() == []
    for ordinal in range(3):
        evaluated(held, ordinal, ["uncond"])
        evaluated(held, ordinal, ["cond"])
    assert held.plan() == {"sites": 2, "of": 4, "bytes": held.budget} and held_bytes(held) == held.budget


@pytest.mark.parametrize("size, sites", [(9, 3), (16, 2), (7, 4)])
def test_what_comes_larger_than_foreseen_gets_room_for_its_own_size_or_none(size, sites):
    held = memory(budget=4 * 2 * 2 * 8 * 4)
    for site in SITES:
        held.promise(site, features(8))
    assert held.has_room()
    for ordinal in range(3):
        evaluated(held, ordinal, ["cond", "uncond"], size=size)
    assert held.plan()["sites"] == sites and held.plan()["bytes"] == held_bytes(held) <= held.budget


def test_what_was_foreseen_and_did_not_come_gives_its_room_back():
    held = memory(budget=2 * 8 * 4 * 2)
    held.promise(SITES[0], features(8, ["another"]))
    held.promise(SITES[1], features(8, ["cond"]))
    held.promise(SITES[2], features(8, ["another"]))
    evaluated(held, 0, ["cond"], SITES[1:2])
    assert held.plan() == {"sites": 2, "of": 3, "bytes": 128} and not held.has_room()
    held.withdraw()
    assert held.plan() == {"sites": 1, "of": 1, "bytes": 64} and held.has_room()
    evaluated(held, 1, ["cond"], SITES[:2])
    assert held.plan()["sites"] == 2


@pytest.mark.parametrize("dtype", ["native", "fp16", "fp8"])
@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_on_its_way_between_two_devices_is_in_the_budget(depth, dtype):
    """Copies that leave the GPU stay there until they have arrived, and the next site comes while one is used."""
    branches = ["cond", "uncond"]
    with no_gpu():
        held = FeatureMemory(StorageSettings(10**9, "cpu", dtype), depth)
        held.storage = Elsewhere(StorageSettings(10**9, "cpu", dtype), depth)
        one, most = held.storage.nbytes(torch.ones(1, 5, 8)), 0
        for ordinal in range(depth):
            for branch in branches:
                held.record(branch, "self", ordinal)
            for site in SITES:
                held.store(site, dict.fromkeys(branches, (torch.ones(1, 5, 8, device="cuda"),)), 1.0 - 0.1 * ordinal)
                most = max(most, held_bytes(held))
        for site in SITES:
            used = [t for outputs in held.recall(branches, site) for _, (t,) in outputs if dtype == "native"]
            most = max(most, held_bytes(held) + sum(t.numel() * t.element_size() for t in used))
    assert one * len(branches) * len(SITES) < most <= held.plan()["bytes"]


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


@pytest.mark.parametrize("depth", [1, 3])
def test_a_full_memory_takes_no_new_room_and_forecasts_from_it_stay_as_they_were(depth):
    memory = FeatureMemory(StorageSettings(), depth)
    outputs = [torch.full((2, 3), float(i)) for i in range(7)]
    places = []
    for ordinal, output in enumerate(outputs):
        memory.record("cond", "self", ordinal)
        memory.store(("self", 0), {"cond": (output, None)}, 1.0 - 0.1 * ordinal)
        places.append({t.data_ptr() for t in memory.tensors()})
    assert all(place == places[depth] for place in places[depth:])
    [kept] = memory.recall(["cond"], ("self", 0))
    assert [feature[0][0, 0].item() for _, feature in kept] == [6.0, 5.0, 4.0][:depth]
