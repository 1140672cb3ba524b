"""A pass of the network without numbers: what it would give at every site, before anything is computed.

It runs on a copy of the model whose tensors have a shape, a dtype and a device and nothing else: it takes no memory,
looks at no weight, and nothing that it leaves behind can reach the host.
"""
import functools
import sys
from collections import OrderedDict
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

# What other nodes hand to the network: none of it must see tensors without numbers.
OTHERS = ("wrappers", "callbacks", "patches", "patches_replace", "optimized_attention_override")
# Also of others: what is called when a module is.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
REMEMBERING = type(functools.lru_cache(lambda: None))


class Rehearsal:
    """A pass of a model (the host's BaseModel) that can be run without numbers.

    args, kwargs: as of APPLY_MODEL. opaque: class names of modules that choose by numbers what they run; what they
    give is shaped as what they take. Raises NotImplementedError for a network that is not the host's own.
    """

    def __init__(self, model, args, kwargs, opaque=()):
        if not is_hosts_own(model):
            raise NotImplementedError("the network, or a function of it, is not the host's own")
        self.mode, self.made = FakeTensorMode(allow_non_fake_inputs=True), {}
        with _disable_current_modes(), self.mode:
            self.model, self.args, self.kwargs = (without_numbers(part, self.made)
                                                  for part in (model, args[:4], kwargs))
        self.options = {**{name: value for name, value in args[5].items() if name not in OTHERS},
                        "optimized_attention_override": attention_output}
        self.network = self.model.diffusion_model
        for module in self.network.modules():
            if type(module).__name__ in opaque:
                module.forward = torch.empty_like

    def run(self, options):
        """Run the pass under `options` for the network; control residuals, which change no shape, are left out.

        Who counts or records what tensors do does not notice.
        """
        with forgotten(), _disable_current_modes(), self.mode, torch.no_grad():
            self.model._apply_model(*self.args, None, options, **self.kwargs)

    def close(self):
        """Let go of everything at once: the copy knows the host's ModelPatcher, which counts who does."""
        for module in self.made.values():
            vars(module).clear()


@contextmanager
def forgotten():
    """What functions of the host compute meanwhile, they do not remember (functools.lru_cache)."""
    functions = {function for name, module in list(sys.modules.items()) if name.startswith("comfy.")
                 for function in vars(module).values() if isinstance(function, REMEMBERING)}
    before = {function: function.cache_info().misses for function in functions}
    try:
        yield
    finally:
        for function, misses in before.items():
            if function.cache_info().misses > misses:
                function.cache_clear()


def is_hosts_own(model):
    """True where the network is a class of the host, and nobody has put a function in place of a method of it.

    What others put there may keep what it sees.
    """
    network = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
    modules = [getattr(module, "_orig_mod", module) for module in model.modules()]
    return type(network).__module__.startswith("comfy.") and all(
        getattr(function, "__func__", None) is getattr(type(module), name)
        for module in modules for name, function in _methods(module).items())


def without_numbers(value, made):
    """A copy of `value`, with what lies in it, that shares no tensor, module, list or dict with it.

    made: {id: copy} of the modules that were copied already. Call it under a FakeTensorMode.
    """
    if torch.is_tensor(value):
        return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device=value.device)
    if isinstance(value, torch.nn.Module):
        module = getattr(value, "_orig_mod", value)
        return made[id(module)] if id(module) in made else _module(module, made)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, without_numbers(item, made)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(without_numbers(item, made) for item in value)
    return value


def _methods(module):
    """What stands on a module itself in place of a method of its class: {name: function}.

    The host puts a method back there when it takes a patch away.
    """
    return {name: value for name, value in vars(module).items() if callable(getattr(type(module), name, None))}


def _module(module, made):
    """A module as `module`, without numbers, hooks and compiled code."""
    copy, methods = object.__new__(type(module)), _methods(module)
    made[id(module)] = copy
    vars(copy).update({name: without_numbers(value, made) for name, value in vars(module).items()
                       if name not in methods})
    vars(copy).update({name: type(vars(module)[name])() for name in HOOKS}, _compiled_call_impl=None)
    copy._apply = lambda *args, **kwargs: copy  # there is nothing to move
    if hasattr(module, "comfy_cast_weights"):
        # The host's layers bring their weights through this method. Where they do, these are in its hands alone:
        # some of it would take a weight that was brought without numbers for one that is there.
        copy.comfy_cast_weights, copy.layout_type = True, None
        copy.forward_comfy_cast_weights = _layer_output(copy)
    return copy


def _layer_output(layer):
    """What gives the output of one of the host's layers, by its class."""
    if hasattr(layer, "out_features"):
        return lambda x, *args, **kwargs: x.new_empty((*x.shape[:-1], layer.out_features))
    if isinstance(layer, torch.nn.Embedding):
        return lambda x, out_dtype=None: torch.empty((*x.shape, layer.embedding_dim), device=x.device,
                                                     dtype=out_dtype or layer.weight.dtype)
    if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        return lambda x, *args, **kwargs: layer._conv_forward(x, x.new_empty(layer.weight.shape), None)
    if "Norm" in type(layer).__name__:
        return lambda x, *args, **kwargs: torch.empty_like(x)
    raise NotImplementedError(f"a layer of class {type(layer).__name__}")


def attention_output(attention, q, k, v, heads, *args, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """What the host's attention gives, [batch, tokens, heads * width] or [batch, heads, tokens, width]."""
    batch, tokens, width = q.shape[0], q.shape[-2], v.shape[-1] if skip_reshape else v.shape[-1] // heads
    return q.new_empty((batch, heads, tokens, width) if skip_output_reshape else (batch, tokens, heads * width))
