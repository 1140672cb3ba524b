"""Whether the network itself answers when it is called: a cache of another node answers in its place, now and then.

That is seen by its effect, whatever it is called and wherever it sits: most of the blocks that ran at first do not run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

# The network answers by itself where at least this share of its blocks run: guidance by skipped layers leaves out few.
SHARE = 0.5


class NetworkWatch:
    """Watches the blocks of one network during one run, in the thread that runs it."""

    def __init__(self, network: nn.Module) -> None:
        self._thread: int | None = None
        self._ran: set[int] = set()
        self._most = 0
        self._handles = [b.register_forward_pre_hook(partial(self._see, i)) for i, b in enumerate(blocks_of(network))]

    def call(self, run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """What `run` returns, and whether the network itself computed it."""
        self._ran.clear()
        self._thread = threading.get_ident()
        try:
            output = run()
        finally:
            self._thread = None
        self._most = max(self._most, len(self._ran))
        return output, len(self._ran) >= SHARE * self._most

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, index: int, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            self._ran.add(index)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The modules in the outermost lists of a network, where it has such."""
    blocks: list[nn.Module] = []
    for child in network.children():
        listed = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        blocks += list(child.children()) if listed else blocks_of(child)
    return blocks
