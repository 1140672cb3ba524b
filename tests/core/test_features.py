"""Feature reuse where memory is short, and in small dtypes."""

import pytest
import torch

from fastercache_core.clock import Evaluation, Interval
from fastercache_core.features.memory import FeatureMemory
from fastercache_core.features.reuse import ReuseCache, ReuseSettings
from fastercache_core.features.storage import StorageSettings, Stored
from support.elsewhere import Elsewhere, PinnedMemory, no_gpu

ONE = 32 * 32 * 4  # bytes of a feature
OFFLOADED = StorageSettings(10**9, "cpu")


def feature() -> torch.Tensor:
    """A feature on the GPU that is not there."""
    return torch.ones(32, 32, device="cuda")


def offloading(limit: int) -> Elsewhere:
    """A storage in main memory, so many bytes of which may be page-locked."""
    storage = Elsewhere(OFFLOADED)
    storage.pinned_limit = limit
    return storage


def pinned_of(stored: list[Stored]) -> list[bool]:
    return [one.pinned > 0 for one in stored]


def test_where_page_locking_fails_features_are_stored_in_other_memory() -> None:
    """And the system is not asked again."""
    pinned = PinnedMemory(most=2)
    with no_gpu(pinned):
        storage = offloading(10**9)
        stored = [storage.put(feature()) for _ in range(5)]
        assert pinned_of(stored) == [True, True, False, False, False] and pinned.tensors == 3
        assert all(one.data.device.type == "cpu" and storage.get(one).device.type == "cuda" for one in stored)


def test_page_locked_memory_is_bounded() -> None:
    pinned = PinnedMemory()
    with no_gpu(pinned):
        storage = offloading(3 * ONE + ONE // 2)
        stored = [storage.put(feature()) for _ in range(5)]
        assert pinned_of(stored) == [True, True, True, False, False] and pinned.tensors == 3
        storage.drop(stored[0])
        assert pinned_of([storage.put(feature()), storage.put(feature())]) == [True, False]


def test_no_memory_is_page_locked_unless_it_is_offered() -> None:
    pinned = PinnedMemory()
    with no_gpu(pinned):
        offloading(0).put(feature())
    assert pinned.tensors == 0


@pytest.mark.parametrize("dtype", ["native", "fp8"])
def test_page_locked_memory_is_given_back_in_a_long_run(dtype: str) -> None:
    """As outputs are replaced by newer ones and when everything is forgotten."""
    pinned = PinnedMemory()
    with no_gpu(pinned):
        memory = FeatureMemory(StorageSettings(10**9, "cpu", dtype), depth=3)
        memory.storage = Elsewhere(StorageSettings(10**9, "cpu", dtype), 3)
        memory.offer(10**9, 5 * ONE)
        counts = []
        for ordinal in range(12):
            if ordinal % 6 == 0:
                memory.forget()
            memory.record("cond", "self", ordinal)
            before = pinned.tensors
            memory.store(("self", 0), {"cond": (feature(),)}, 1.0 - 0.01 * ordinal)
            counts.append(pinned.tensors - before)
    assert all(counts) and len(counts) == 12, "there was always room"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gains_of_small_dtypes_are_fitted_in_float32(dtype: torch.dtype) -> None:
    """Squares of their elements, summed, are beyond what float16 holds."""
    cache = ReuseCache(ReuseSettings({"self": Interval(2)}, "fitted"), lambda percent: 1.0 - percent)
    line = [torch.full((1, 2**14), 1000.0 + 100 * i, dtype=dtype) for i in range(6)]
    for ordinal, output in enumerate(line[:5]):
        cache.begin(Evaluation(ordinal, 1.0 - 0.1 * ordinal, 0.0, False))
        cache.begin_record(["cond"], {"self"})
        cache.store(("self", 0), ["cond"], (output,))
    cache.begin(Evaluation(5, 0.5, 0.0, False))
    [forecast] = cache.recall(("self", 0), ["cond"])
    assert forecast is not None and forecast.dtype == dtype
    torch.testing.assert_close(forecast, line[5], rtol=0.02, atol=0.0)
