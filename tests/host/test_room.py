"""How much memory features may take: of a GPU whose weights come and go, and of memory that is page-locked."""

from types import SimpleNamespace

import comfy.model_management as host_memory
import pytest
import torch
from fastercache_pack.nodes.host.room import PINNED_SHARE, SHARE, free_bytes, pinned_bytes

GB = 1024**3
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Sets what the host reports free on every device."""
    monkeypatch.setattr(host_memory, "minimum_inference_memory", lambda: GB)

    def report(amount):
        monkeypatch.setattr(host_memory, "get_free_memory", lambda device=None, *_: amount)

    return report


def evicting(amount):
    """A ModelPatcher that tells what the host takes out of GPU memory when it is short."""
    return SimpleNamespace(get_free_memory=lambda device: host_memory.get_free_memory(device) + amount)


def test_weights_that_can_leave_count_as_free_on_a_gpu(free):
    free(2 * GB)
    assert free_bytes(SimpleNamespace(), GPU, 4 * GB) == 0
    assert free_bytes(evicting(10 * GB), GPU, 4 * GB) == SHARE * 8 * GB


def test_they_make_no_room_in_main_memory(free):
    free(6 * GB)
    assert free_bytes(evicting(10 * GB), CPU, 0) == free_bytes(SimpleNamespace(), CPU, 0) == SHARE * 5 * GB


def test_what_sampling_needs_is_left_to_it(free):
    free(8 * GB)
    assert free_bytes(SimpleNamespace(), GPU, 0) == SHARE * 7 * GB, "the host's minimum"
    assert free_bytes(SimpleNamespace(), GPU, 20 * GB) == 0


@pytest.mark.parametrize("most, taken, given", [(32, 4, 4), (6, 4, 2), (4, 6, 0), (-1, 0, 0)])
def test_page_locked_memory_is_bounded_by_what_the_host_would_lock(free, monkeypatch, most, taken, given):
    """A quarter of what is free, no more than the host leaves, none where it locks none (--disable-pinned-memory)."""
    free(16 * GB)
    monkeypatch.setattr(host_memory, "MAX_PINNED_MEMORY", most * GB, raising=False)
    monkeypatch.setattr(host_memory, "TOTAL_PINNED_MEMORY", taken * GB, raising=False)
    assert pinned_bytes() == min(given * GB, PINNED_SHARE * 16 * GB)


def test_a_host_that_tells_nothing_of_that_leaves_the_share(free, monkeypatch):
    free(16 * GB)
    monkeypatch.delattr(host_memory, "MAX_PINNED_MEMORY", raising=False)
    assert pinned_bytes() == PINNED_SHARE * 16 * GB
