"""Features that leave a GPU, without one: tensors have no values, and copies are there at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastercache_core.features.storage import Storage

EMPTY = torch.empty


class Elsewhere(Storage):
    """Storage whose copies are done when they begin, but count as on their way until waited for."""

    def _copy_beside(self, device: Any, targets: Any, sources: Any) -> None:
        for target, source in zip(targets, sources):
            target.copy_(source)


class PinnedMemory:
    """The page-locked memory of a machine: `tensors` of it were asked for; more than `most` of them fail."""

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.tensors = most, 0

    def empty(self, *args: Any, pin_memory: bool | None = None, **kwargs: Any) -> torch.Tensor:
        """Takes the place of torch.empty."""
        if pin_memory:
            self.tensors += 1
            if self.tensors > self.most:
                raise RuntimeError("CUDA error: out of memory")
        return EMPTY(*args, **kwargs)


@contextmanager
def no_gpu(pinned: PinnedMemory | None = None) -> Iterator[None]:
    """While open, there is a device "cuda" that computes nothing."""
    stream = SimpleNamespace(wait_event=lambda event: None)
    with (
        FakeTensorMode(),
        mock.patch.object(torch.cuda, "current_stream", lambda device: stream),
        mock.patch.object(torch, "empty", (pinned or PinnedMemory()).empty),
    ):
        yield
