"""Stands in for the host's compiler: what its graph of allocations asks of every pass of a network."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy
import torch
from comfy.cli_args import args
from fastercache_pack.nodes.host import compiler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SWITCHES = ("disable_comfy_compiler", "disable_cuda_graphs")


class Allocations(TorchDispatchMode):
    """Every memory that is allocated while open; `paused`: but for what is allocated now."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, function: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if not self.paused:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            made = [t.untyped_storage() for t in tree_leaves(output) if torch.is_tensor(t)]
            self._storages += [StorageWeakRef(storage) for storage in made if storage._cdata not in given]
        return output

    def alive(self) -> int:
        """How many of them were not freed."""
        return sum(not storage.expired() for storage in self._storages)


class Compiler:
    """Compiles the passes of a network on a host of `version`, unless that is switched off.

    A pass that leaves memory behind, or runs other layers than were recorded, is an error, or where the stand-in is
    `tolerant` a break. passes: of which the first `compiled` ones, and in which state the host's switches were; left:
    what outlived its pass; cleaned: how often the host was asked to clear up.
    """

    def __init__(self, network: torch.nn.Module, monkeypatch: Any, version: str, tolerant: bool = False) -> None:
        self.tolerant, self.forward = tolerant, network.forward
        self.compiled = self.uncompiled = self.breaks = self.left = self.cleaned = 0
        self.switched: set[tuple[bool, ...]] = set()
        self.recorded: list[str] | None = None
        self.layers: list[str] = []
        self.allocations = Allocations()
        for name in SWITCHES:
            monkeypatch.setattr(args, name, False, raising=False)
        monkeypatch.setattr(args, "assert_graph_breaks", False, raising=False)
        monkeypatch.setattr(compiler, "comfyui_version", types.SimpleNamespace(__version__=version))
        module = getattr(comfy, "model_prefetch", types.ModuleType("comfy.model_prefetch"))
        monkeypatch.setattr(comfy, "model_prefetch", module, raising=False)
        for name, function in self._host().items():
            monkeypatch.setattr(module, name, function, raising=False)
        monkeypatch.setattr(network, "forward", self._pass)
        self.hooks = [
            layer.register_forward_pre_hook(lambda *_, name=name: self.layers.append(name))
            for name, layer in network.named_modules()
            if not list(layer.children()) and list(layer.parameters())
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()

    def _host(self) -> dict[str, Any]:
        return {
            "malloc_graph_enabled": lambda device: not args.disable_comfy_compiler,
            "malloc_graph_begin": lambda *_: None,
            "malloc_graph_end": lambda: None,
            "pause_malloc_graph": self._pause,
            "cleanup_prefetch_queues": self._clean,
        }

    @contextmanager
    def _pause(self, sync: bool = False) -> Iterator[None]:
        assert not self.allocations.paused, "the pause would end with the inner one"
        self.allocations.paused = True
        yield
        self.allocations.paused = False

    def _clean(self) -> None:
        self.cleaned += 1

    def _pass(self, *arguments: Any, **options: Any) -> torch.Tensor:
        self.switched.add(tuple(getattr(args, name) for name in SWITCHES))
        if args.disable_comfy_compiler:
            self.uncompiled += 1
            return self.forward(*arguments, **options)
        self.compiled += 1
        self.layers = []
        self.allocations = Allocations()
        with self.allocations:
            inside = self.forward(*arguments, **options)
        output = inside.clone()
        del inside
        left, other = self.allocations.alive(), self.recorded not in (None, self.layers)
        self.recorded = self.recorded or self.layers
        self.left += left
        self.breaks += bool(left or other)
        if (left or other) and not self.tolerant:
            raise RuntimeError("memory compile error")
        return output
