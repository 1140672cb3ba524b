"""The host's own compiler (0.34 on) and CUDA graphs (0.33 on), which record what a pass does and repeat it.

The compiler records what a pass allocates and frees, block by block; a CUDA graph repeats the work of a block without
calling it. Predicted steps and CFG-Cache act outside of a pass: nothing that is recorded changes. Feature reuse changes
it: what it stores outlives the pass, and blocks do not run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy
import comfy.cli_args
import torch

try:
    import comfyui_version
except ImportError:  # the host tells no version
    comfyui_version = None

# From this version of the host on, a pass that allocates otherwise than recorded is computed without the record.
TOLERANT = (0, 37)


class Options:
    """Options of the host that are on as long as any run wants them so. Runs may lie within each other or go on side by
    side: when the last one ends, however it ends, every option is what it was before the first."""

    def __init__(self) -> None:
        self._lock, self._runs = threading.Lock(), 0
        self._before: dict[str, bool] = {}

    @contextmanager
    def on(self, names: Iterable[str]) -> Iterator[None]:
        """While open, those of the options `names` that the host has are on."""
        with self._lock:
            self._runs += 1
            for name in names:
                if hasattr(comfy.cli_args.args, name):
                    self._before.setdefault(name, getattr(comfy.cli_args.args, name))
                    setattr(comfy.cli_args.args, name, True)
        try:
            yield
        finally:
            with self._lock:
                self._runs -= 1
                if not self._runs:
                    vars(comfy.cli_args.args).update(self._before)
                    self._before = {}


_OPTIONS = Options()


def nothing_repeated() -> AbstractContextManager[None]:
    """While open, the host repeats nothing that feature reuse changes."""
    names = ["disable_cuda_graphs"]
    return _OPTIONS.on(names if tolerates_changes() else [*names, "disable_comfy_compiler"])


def tolerates_changes() -> bool:
    """True where the host's compiler copes with passes that allocate otherwise than recorded."""
    version = tuple(map(int, re.findall(r"\d+", getattr(comfyui_version, "__version__", ""))[:2]))
    return version >= TOLERANT and not getattr(comfy.cli_args.args, "assert_graph_breaks", False)


def compiles(device: torch.device) -> bool:
    """True where the host's compiler records passes on `device`."""
    enabled = getattr(_prefetch(), "malloc_graph_enabled", None)
    return bool(enabled and enabled(device))


def unrecorded() -> AbstractContextManager[Any]:
    """While open, the host's compiler does not record what is allocated: it may outlive the pass."""
    pause = getattr(_prefetch(), "pause_malloc_graph", None)
    return pause() if pause else nullcontext()


def abandon_pass() -> None:
    """Clear up after a pass that broke off: the host would hold its weights in GPU memory until the node ends."""
    clean = getattr(_prefetch(), "cleanup_prefetch_queues", None)
    if clean:
        clean()


def _prefetch() -> Any:
    """The host's module for all that, None before the host loaded it and where it has none."""
    return getattr(comfy, "model_prefetch", None)
