"""Small results of the device, for the host to decide by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readback:
    """Reads small tensors, one after the other, during one run."""

    _coming: tuple[Tensor, torch.cuda.Event | None, Any] | None

    def __init__(self, late: bool = False) -> None:
        """late: every read returns the values of the one before, which have long arrived, so that the host never waits
        for what it has only just given the device to do."""
        self.late = late
        self.reset()

    def read(self, values: Tensor, about: Any) -> tuple[list[float] | None, Any]:
        """Floats, and what they are about: `values` [n] with `about`, or those of the read before; (None, None) where
        there was none."""
        if not self.late:
            return values.tolist(), about
        before, self._coming = self._coming, (*begin_copy(values), about)
        if before is None:
            return None, None
        copy, arrived, about = before
        if arrived is not None:
            arrived.synchronize()
        return copy.tolist(), about

    def reset(self) -> None:
        """Forget what is on its way."""
        self._coming = None


def begin_copy(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of `values` in main memory that is on its way, and the event of its arrival; (copy, None) where there is
    nothing to wait for."""
    if values.device.type != "cuda":
        return values.clone(), None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    return copy, torch.cuda.current_stream(values.device).record_event()
