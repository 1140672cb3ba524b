"""The lists of blocks of a network that nobody entered, found by watching one pass of it.

A list counts whose blocks are of one class and run in order, once each, every one on what the one before it gave:
tensors that keep their shape, with the batch along their first axis.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .families import Stack
from .feature_hooks import Forward, around, swapped

# A list counts with so much of the weights of the largest one: those beside refine the prompt.
LEAST_SHARE = 1 / 3


class BlockList:
    """One list of like blocks while a pass is watched. blocks: what is in it; started: its place in the order of lists,
    None before its first block ran."""

    def __init__(self, path: str, blocks: Sequence[nn.Module], batch: int) -> None:
        """batch: how many latents the pass has."""
        self.path, self.blocks, self.batch = path, blocks, batch
        self._ran, self._as_wanted, self._whole = 0, True, False
        self._streams: tuple[Any, ...] = ()
        self._given: dict[Any, torch.Size] = {}  # to the first block
        self._output: tuple[Tensor | None, ...] = ()
        self._earlier: list[weakref.ref[Tensor]] = []

    def weight(self) -> int:
        """How many numbers its weights are."""
        return sum(parameter.numel() for block in self.blocks for parameter in block.parameters())

    def stack(self) -> Stack | None:
        """What feature reuse takes it for, None where it does not count."""
        shapes = [self._given.get(key) for key in self._streams]
        if not (self._as_wanted and self._ran == len(self.blocks) and shapes and self._fit(shapes)):
            return None
        return Stack(self.path, self._streams, self._whole)

    def enter(self, number: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Block `number` is called: on what came out of the one before it?"""
        given = dict(_tensors(args, kwargs))
        if number == 0:
            self._given = {key: t.shape for key, t in given.items()}
        else:
            streams = tuple(next((key for key, t in given.items() if t is out), None) for out in self._output)
            self._as_wanted &= None not in streams and self._streams in ((), streams)
            self._streams = streams
            others = [t for key, t in given.items() if key not in streams]
            self._whole |= any(t is earlier() for t in others for earlier in self._earlier)
        self._as_wanted &= number == self._ran

    def leave(self, output: Any) -> None:
        """A block gave `output`."""
        single = torch.is_tensor(output)
        self._output = (output,) if single else output if isinstance(output, tuple) else ()
        self._earlier += [weakref.ref(t) for t in self._output if torch.is_tensor(t)]
        self._ran += 1

    def _fit(self, shapes: Sequence[torch.Size | None]) -> bool:
        """True when the last block gave what the first one took, in `shapes`, one slice for each latent."""
        return len(shapes) == len(self._output) and all(
            shape is not None and self._is_batch_first(shape) and (out is None or out.shape == shape)
            for shape, out in zip(shapes, self._output, strict=True)
        )

    def _is_batch_first(self, shape: torch.Size) -> bool:
        """True when the first axis, and none but it, may be that of the latents; the last one holds the numbers."""
        return shape[:1] == (self.batch,) and (self.batch == 1 or shape[:-1].count(self.batch) == 1)


@contextmanager
def watching(network: nn.Module, batch: int) -> Iterator[list[BlockList]]:
    """While open, a pass of `network` on `batch` latents shows what its lists of blocks do."""
    lists = [
        BlockList(name, list(module), batch)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1
    ]

    def watch(blocks: BlockList, number: int, forward: Forward) -> Forward:
        def watched(forward: Forward, *args: Any, **kwargs: Any) -> Any:
            blocks.enter(number, args, kwargs)
            output = forward(*args, **kwargs)
            blocks.leave(output)
            return output

        return around(watched, forward)

    with swapped([(b, "forward", watch(l, i, b.forward)) for l in lists for i, b in enumerate(l.blocks)]):
        yield lists


def stacks_of(lists: Sequence[BlockList]) -> tuple[Stack, ...]:
    """Those of `lists` that count, in the order of the network: the outermost, and of these the large ones."""
    found: list[tuple[int, Stack]] = []
    for blocks in lists:
        stack = blocks.stack()
        inside = any(blocks.path.startswith(other.path + ".") for _, other in found)
        if stack and not inside:
            found.append((blocks.weight(), stack))
    most = max((weight for weight, _ in found), default=0)
    return tuple(stack for weight, stack in found if weight >= LEAST_SHARE * most)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """(key as of Stack.streams, tensor) of what a block is given."""
    for key, value in [*enumerate(args), *kwargs.items()]:
        if torch.is_tensor(value):
            yield key, value
        elif isinstance(value, (tuple, list)):
            yield from (((key, place), item) for place, item in enumerate(value) if torch.is_tensor(item))
