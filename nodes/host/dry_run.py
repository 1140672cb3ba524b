"""A pass of the network without values: the shapes of what it gives at every site, before anything is computed.

It runs on a copy of the model whose tensors have a shape, a dtype and a device and nothing else: it takes no memory,
looks at no weight, and nothing that it leaves behind can reach the host.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from .model_call import ModelCall, uncompiled

# What nodes hand to the network, and may keep what it sees: none of it must see tensors without values.
OTHERS = ("wrappers", "callbacks", "patches", "patches_replace", "optimized_attention_override", "animate2_cache")
# Also of others: what is called when a module is.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
CACHED_FUNCTION = type(functools.lru_cache(lambda: None))


class DryRun:
    """A pass of a model (the host's BaseModel) that can be run without values."""

    def __init__(self, call: ModelCall, opaque: Iterable[str] = ()) -> None:
        """call: the pass that is about to run; opaque: class names of modules that choose by values what they run, with
        an output shaped as their input. Raises NotImplementedError for a network that is not the host's own."""
        if not is_hosts_own(call.model):
            raise NotImplementedError("the network, or a function of it, is not the host's own")
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, Any] = {}
        with _disable_current_modes(), self.mode:
            inputs = (call.x, call.t, call.c_concat, call.c_crossattn)
            self.model, self.inputs, self.kwargs = (
                without_values(part, self._made) for part in (call.model, inputs, dict(call.kwargs))
            )
        own = {name: value for name, value in call.options.items() if name not in OTHERS}
        self.options: dict[str, Any] = {**own, "optimized_attention_override": attention_output}
        self.network = self.model.diffusion_model
        for module in self.network.modules():
            if type(module).__name__ in opaque:
                module.forward = torch.empty_like

    def run(self, options: Mapping[str, Any]) -> None:
        """Run the pass under `options` for the network; control residuals, which change no shape, are left out.

        Modes that count or record what tensors do are not told.
        """
        with forgotten(), _disable_current_modes(), self.mode, torch.no_grad():
            self.model._apply_model(*self.inputs, None, options, **self.kwargs)

    def close(self) -> None:
        """Let go of everything at once: the copy refers to the host's ModelPatcher, which counts its references."""
        for module in self._made.values():
            vars(module).clear()


@contextmanager
def forgotten() -> Iterator[None]:
    """What functions of the host compute meanwhile, their caches (functools.lru_cache) forget."""
    functions = {
        function
        for name, module in list(sys.modules.items())
        if name.startswith("comfy.")
        for function in vars(module).values()
        if isinstance(function, CACHED_FUNCTION)
    }
    before = {function: function.cache_info().misses for function in functions}
    try:
        yield
    finally:
        for function, misses in before.items():
            if function.cache_info().misses > misses:
                function.cache_clear()


def is_hosts_own(model: Any) -> bool:
    """True where the network is a class of the host, and nobody has put a function in place of a method of it.

    What others put there may store what it sees.
    """
    modules = [uncompiled(module) for module in model.modules()]
    return type(uncompiled(model.diffusion_model)).__module__.startswith("comfy.") and all(
        getattr(function, "__func__", None) is getattr(type(module), name)
        for module in modules
        for name, function in _methods(module).items()
    )


def without_values(value: Any, made: dict[int, Any]) -> Any:
    """A copy of `value`, with what lies in it, that shares no tensor, module, list or dict with it.

    made: {id: copy} of the modules that were copied already. Call it under a FakeTensorMode.
    """
    if torch.is_tensor(value):
        return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device=value.device)
    if isinstance(value, torch.nn.Module):
        module = uncompiled(value)
        return made[id(module)] if id(module) in made else _module(module, made)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, without_values(item, made)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(without_values(item, made) for item in value)
    return value


def _methods(module: Any) -> dict[str, Any]:
    """What stands on a module itself in place of a method of its class: {name: function}.

    The host puts a method back there when it takes a patch away.
    """
    return {name: value for name, value in vars(module).items() if callable(getattr(type(module), name, None))}


def _module(module: Any, made: dict[int, Any]) -> Any:
    """A module as `module`, without values, hooks and compiled code."""
    copy, methods = object.__new__(type(module)), _methods(module)
    made[id(module)] = copy
    own = {name: without_values(value, made) for name, value in vars(module).items() if name not in methods}
    vars(copy).update(own)
    vars(copy).update({name: type(vars(module)[name])() for name in HOOKS}, _compiled_call_impl=None)
    copy._apply = lambda *args, **kwargs: copy  # there is nothing to move
    if hasattr(module, "comfy_cast_weights"):
        # The host's layers bring their weights through this method. Where they do, these are in its hands alone: some
        # of it would take a weight that was brought without values for one that is there.
        copy.comfy_cast_weights, copy.layout_type = True, None
        copy.forward_comfy_cast_weights = _layer_output(copy)
    return copy


def _layer_output(layer: Any) -> Callable[..., Tensor]:
    """What gives the output of one of the host's layers, by its class."""
    if hasattr(layer, "out_features"):
        return lambda x, *args, **kwargs: x.new_empty((*x.shape[:-1], layer.out_features))
    if isinstance(layer, torch.nn.Embedding):
        return lambda x, out_dtype=None: torch.empty(
            (*x.shape, layer.embedding_dim), device=x.device, dtype=out_dtype or layer.weight.dtype
        )
    if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        return lambda x, *args, **kwargs: layer._conv_forward(x, x.new_empty(layer.weight.shape), None)
    if "Norm" in type(layer).__name__:
        return lambda x, *args, **kwargs: torch.empty_like(x)
    raise NotImplementedError(f"a layer of class {type(layer).__name__}")


def attention_output(attention: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the host's attention gives, [batch, tokens, heads * width] or [batch, heads, tokens, width]."""
    heads = kwargs["heads"] if "heads" in kwargs else args[0]
    batch, tokens, width = q.shape[0], q.shape[-2], v.shape[-1]
    if not kwargs.get("skip_reshape"):  # heads have no axis of their own
        width //= heads
    apart = kwargs.get("skip_output_reshape")
    return q.new_empty((batch, heads, tokens, width) if apart else (batch, tokens, heads * width))
