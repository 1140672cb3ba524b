"""Features at rest: in which dtype and on which device they are, and how they come back.

fp8 is e4m3 with one scale for each row (last axis), so that one large token does not cost the others their precision. A
forecast multiplies errors: in fp8 alone, 2.6% of error in every element cost 4 to 5 dB. So where several outputs of a
site are stored, "fp8" is for the changes that lead back from the newest one, which is stored in 16 bits: the error is
then a fraction of the changes, which are small.

Errors: fp16 at most 2**-11 of an element (elements beyond +-65504 are clamped); fp8 at most 2**-4 + 2**-7 of it, plus
2**-18 of the largest one in its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = ("native", "fp16", "fp8")
FP8_MAX, FP16_MAX = 448.0, 65504.0  # the largest elements of e4m3 and of fp16
# So many features may be on their way off a GPU at once: each takes room there until it has arrived.
LEAVING = 2


@dataclass(frozen=True)
class StorageSettings:
    """Where and how features are stored.

    budget: bytes that may be held, None for as many as are offered. device: None for the feature's own, else a device
    name such as "cpu" or "cuda:1". dtype: one of DTYPES; "fp8" stores the newest of several outputs as "fp16" does.
    """

    budget: int | None = None
    device: str | None = None
    dtype: str = "native"


@dataclass
class Stored:
    """A feature at rest: `data` and, for fp8, its `scale`; `dtype` and `device` are those it came with.

    pinned: how many bytes of it are page-locked; coming: copies on their way to `device`, and the event after which
    they are there.
    """

    data: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    device: torch.device
    pinned: int = 0
    coming: tuple[list[Tensor], Any] | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor at rest."""
        return [t for t in (self.data, self.scale) if t is not None]

    def held(self) -> list[Tensor]:
        """Every tensor at rest or on its way back."""
        return [*self.tensors(), *(self.coming[0] if self.coming else ())]


class Storage:
    """Puts features to rest and brings them back, copying beside the computation where it can.

    Of every feature, the newest `outputs` values are stored. by_change: True where all but the newest one are stored as
    their change to the next newer one (newer - older), with `put_change`. pinned_limit: bytes of main memory that may
    be page-locked, which makes copies faster but takes that memory from everything else.

    All GPU memory belongs to the stream of the computation, which waits for a copy on the side stream before it lets go
    of the memory: so memory is free for others at once, however far the CPU is ahead.
    """

    def __init__(self, settings: StorageSettings, outputs: int = 1) -> None:
        self.outputs = outputs
        self.by_change = settings.dtype == "fp8" and outputs > 1
        self.newest_dtype = "fp16" if self.by_change else settings.dtype
        self.older_dtype = settings.dtype
        self.device = torch.device(settings.device) if settings.device else None
        self.pinned_limit = self._pinned = 0
        self._leaving: list[tuple[Tensor, Any]] = []
        self._stream: Any = None

    def nbytes(self, x: Tensor) -> int:
        """Bytes that all outputs of a feature like `x` will take at rest."""
        return bytes_in(self.newest_dtype, x) + (self.outputs - 1) * bytes_in(self.older_dtype, x)

    def travels(self, x: Tensor) -> bool:
        """True where features like `x` leave their GPU and come back to it."""
        return x.device.type == "cuda" and self.device not in (None, x.device)

    @staticmethod
    def holds_like(stored: Stored | None, x: Tensor | None) -> bool:
        """True where `stored` is a plain tensor as `x` is: same shape, dtype and device."""
        if stored is None or x is None:
            return False
        data = stored.data
        return stored.scale is None and (data.shape, data.dtype, data.device) == (x.shape, x.dtype, x.device)

    def put(self, x: Tensor, spare: Stored | None = None) -> Stored:
        """A copy of `x`, the newest value of a feature, at rest: later work on `x` in place cannot reach it.

        spare: a Stored that `holds_like` it and is written over. Memory that is given back and taken again at every
        evaluation costs more time on a CPU than all forecasts.
        """
        if spare is not None:
            spare.data.copy_(x)
            return spare
        return self._put(x, self.newest_dtype)

    def put_change(self, change: Tensor) -> Stored:
        """What leads from an older value of a feature to the next newer one, at rest."""
        return self._put(change, self.older_dtype)

    def expect(self, stored: Stored) -> None:
        """Begin to bring `stored` back to its GPU, so that `get` finds it there."""
        if stored.coming is None and stored.device.type == "cuda" and stored.data.device != stored.device:
            copies = [torch.empty_like(t, device=stored.device) for t in stored.tensors()]
            stored.coming = copies, self._copy_beside(stored.device, copies, stored.tensors())

    def get(self, stored: Stored) -> Tensor:
        """The feature as it was put, up to the dtype's precision: a tensor that must not be written to."""
        if (stored.data.dtype, stored.data.device) == (stored.dtype, stored.device):
            return stored.data
        self.expect(stored)
        copies = self._arrived(stored) or [t.to(stored.device) for t in stored.tensors()]
        data, *scale = [t.to(stored.dtype) for t in copies]
        return data * scale[0] if scale else data

    def drop(self, stored: Stored) -> None:
        """Let go of `stored`, which may be on its way."""
        self._arrived(stored)
        self._pinned -= stored.pinned
        stored.pinned = 0

    def tensors(self) -> list[Tensor]:
        """Every tensor on its way off a GPU."""
        return [data for data, _ in self._leaving]

    def settle(self) -> None:
        """Wait for all copies, before everything is let go of."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._leaving.clear()

    def _put(self, x: Tensor, dtype: str) -> Stored:
        data, scale = encode(x, dtype)
        before = self._pinned
        stored = Stored(self._move(data), None if scale is None else self._move(scale), x.dtype, x.device)
        stored.pinned = self._pinned - before
        return stored

    def _move(self, data: Tensor) -> Tensor:
        if self.device is None or self.device == data.device:
            return data
        if data.device.type != "cuda" or self.device.type != "cpu":
            return data.to(self.device)
        at_rest = self._place(data)
        self._leaving.append((data, self._copy_beside(data.device, [at_rest], [data])))
        if len(self._leaving) > LEAVING:
            gone, left = self._leaving.pop(0)
            torch.cuda.current_stream(gone.device).wait_event(left)
        return at_rest

    def _place(self, data: Tensor) -> Tensor:
        """Main memory for a tensor like `data`: page-locked as far as the limit and the system allow."""
        size = pinned_bytes(data)
        if self._pinned + size <= self.pinned_limit:
            try:
                place = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
                self._pinned += size
                return place
            except RuntimeError:  # the system gives no more page-locked memory: it is not asked again
                self.pinned_limit = 0
        return torch.empty(data.shape, dtype=data.dtype)

    def _copy_beside(self, device: torch.device, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        """Copy on a stream of its own, after what `device` was given so far; returns the event of its end."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    @staticmethod
    def _arrived(stored: Stored) -> list[Tensor] | None:
        """The copies that were on their way, once the computation waits for them; None if there are none."""
        if stored.coming is None:
            return None
        (copies, arrived), stored.coming = stored.coming, None
        torch.cuda.current_stream(stored.device).wait_event(arrived)
        return copies


def stays(x: Tensor, dtype: str) -> bool:
    """True where `x` is stored in its own dtype: chosen so, or no larger already."""
    return dtype == "native" or x.element_size() <= (2 if dtype == "fp16" else 1)


def bytes_in(dtype: str, x: Tensor) -> int:
    """Bytes of one tensor like `x` in a dtype of DTYPES."""
    if stays(x, dtype):
        return x.numel() * x.element_size()
    if dtype == "fp16":
        return x.numel() * 2
    return x.numel() + x.shape[:-1].numel() * 2


def pinned_bytes(x: Tensor) -> int:
    """Bytes that a page-locked tensor like `x` takes: torch allocates powers of two."""
    return 1 << max(x.numel() * x.element_size() - 1, 0).bit_length()


def encode(x: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """A copy of `x` in a dtype of DTYPES, and the scale of its rows (None but for fp8)."""
    if stays(x, dtype):
        return x.clone(memory_format=torch.contiguous_format), None
    if dtype == "fp16":
        return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16), None
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    scale = (largest / FP8_MAX).clamp_min(torch.finfo(x.dtype).tiny).to(torch.bfloat16)
    return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
