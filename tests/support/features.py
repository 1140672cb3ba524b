"""Feature reuse on tiny models: what every family has, what runs in a pass, and what people put on a model."""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from fastercache_pack.fastercache_core.clock import Interval, Window
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.fastercache_core.features.storage import StorageSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import FasterCache
from fastercache_pack.nodes.features import feature_settings
from fastercache_pack.nodes.host.families import find_family
from fastercache_pack.nodes.host.wrappers import attach
from torch import Tensor

from support.runs import actions, notes, relative
from support.tiny import SPECS, sample

# fmt: off
# Lists of blocks, in the order they run, and modules whose output is an attention's, by family.
BLOCKS = {
    "sd3": ["joint_blocks"], "sd35": ["joint_blocks"], "flux": ["double_blocks", "single_blocks"],
    "chroma": ["double_blocks", "single_blocks"], "hunyuan": ["double_blocks", "single_blocks"],
    "wan": ["blocks"], "wan_vace": ["blocks"], "wan_i2v": ["blocks"], "wan_camera": ["blocks"],
    "ltxv": ["transformer_blocks"], "qwen": ["transformer_blocks"], "lumina2": ["layers"], "omnigen2": ["layers"],
    "predict2": ["blocks"], "cosmos": ["blocks"], "hidream": ["double_stream_blocks", "single_stream_blocks"],
    "pixart": ["blocks"], "mochi": ["blocks"], "aura": ["double_layers", "single_layers"], "hydit": ["blocks"],
    "hunyuan3d": ["double_blocks", "single_blocks"], "flux2": ["double_blocks", "single_blocks"],
    "hunyuan15": ["double_blocks", "single_blocks"], "hunyuan3d21": ["blocks"], "ace": ["transformer_blocks"],
    "audio": ["transformer.layers"], "wan_s2v": ["blocks"], "wan_humo": ["blocks"], "wan_animate": ["blocks"],
}
# Blocks beside them that are left out with those that they add to.
BESIDE = {("wan_vace", "rear"): "vace_blocks.1.", ("wan_vace", "stack"): "vace_blocks.1."}
UNET = {
    "self": r"\.attn1\.", "cross": r"\.attn2\.",
    "deep": r"^(input_blocks\.[23]|middle_block|output_blocks\.[01])\.",
    "branch": r"\.in_layers\.|\.transformer_blocks\.|\.proj_(in|out)$|\.norm$"
              r"|\.time_stack\.\d|\.time_pos_embed\.|\.1\.time_mixer$",
}
SELF_AND_CROSS = {"self": r"blocks\.\d+\.self_attn\.", "cross": r"blocks\.\d+\.cross_attn\."}
ATTENTION = {
    "sd15": UNET, "sdxl": UNET,
    "svd": {**UNET, "self": r"\.transformer_blocks\.\d+\.attn1\.", "temporal": r"\.time_stack\.\d+\.attn1\."},
    "sd3": {"self": r"(x|context)_block\.attn\."}, "sd35": {"self": r"(x|context)_block\.attn2?\."},
    **dict.fromkeys(["wan", "wan_vace", "wan_i2v", "wan_camera", "wan_s2v", "wan_humo", "wan_animate", "predict2"],
                    SELF_AND_CROSS),
    "ltxv": {"self": r"\.attn1\.", "cross": r"\.attn2\."}, "hydit": {"self": r"\.attn1\.", "cross": r"\.attn2\."},
    "cosmos": {"self": r"block\d\.blocks\.0\.block\.", "cross": r"block\d\.blocks\.1\.block\."},
    "pixart": {"self": r"blocks\.\d+\.attn\.", "cross": r"blocks\.\d+\.cross_attn\."},
    "qwen": {"self": r"blocks\.\d+\.attn\."}, "mochi": {"self": r"blocks\.\d+\.attn\."},
    "lumina2": {"self": r"\.attention\."}, "omnigen2": {"self": r"\.attn\."},
    "hidream": {"self": r"\.attn1\."}, "aura": {"self": r"layers\.\d+\.attn\."},
    "hunyuan3d21": {"self": r"\.attn1\.", "cross": r"\.attn2\."},
    "ace": {"self": r"blocks\.\d+\.attn\.", "cross": r"blocks\.\d+\.cross_attn\."},
    "audio": {"self": r"\.self_attn\.", "cross": r"\.cross_attn\."},
}
# The skip connections of this family reach across its blocks: no half can be taken alone.
WHOLE = {"hydit", "hunyuan3d21"}
SPANS = ("front", "rear", "stack")
STACKED = {name: ("stack",) if name in WHOLE else SPANS for name in BLOCKS}
CASES = [(name, kind) for name in SPECS for kind in (*ATTENTION.get(name, ()), *STACKED.get(name, ()))]
# fmt: on

# Steps without length: the latent does not move, so what is held is what would be computed. The step that follows the
# last reuse has a length, so that the picture shows what was held.
STILL = torch.tensor([0.5] * 3 + [0.3, 0.2, 0.0])
ACTIONS = ["computed", "reused", "reused", "computed", "computed"]
ALL_COMPUTED = ["computed"] * len(ACTIONS)


def reusing(*kinds: str, every: int = 3, weight: str = "hold", **storage: Any) -> CacheSettings:
    """Features of `kinds` computed at one evaluation in `every`; storage: of StorageSettings."""
    intervals = dict.fromkeys(kinds, Interval(every))
    return CacheSettings("features", reuse=ReuseSettings(intervals, weight, storage=StorageSettings(**storage)))


def told(model: Any) -> str:
    """The notes of a MODEL's last run, as one text."""
    return "; ".join(notes(model))


class Watch:
    """Which layers run, and how often, in every pass of the network: [(evaluation, {layer: calls})]."""

    def __init__(self, model: Any) -> None:
        self.model, self.evaluation = model, -1
        self.passes: list[tuple[int, dict[str, int]]] = []
        self.hooks: list[Any] = []
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", self._predict_noise)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", self._apply_model)

    def __enter__(self) -> "Watch":
        for name, module in self.model.model.diffusion_model.named_modules():
            if not list(module.children()) and list(module.parameters(recurse=False)):
                self.hooks.append(module.register_forward_pre_hook(functools.partial(self._count, name)))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, name: str, *_: Any) -> None:
        if self.passes:  # some run layers before the first pass, for all of them
            calls = self.passes[-1][1]
            calls[name] = calls.get(name, 0) + 1

    def _predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.evaluation += 1
        return executor(*args, **kwargs)

    def _apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.passes.append((self.evaluation, {}))
        return executor(*args, **kwargs)


def host_picture(model: Any, sample: Callable[[Any], Tensor]) -> tuple[Tensor, dict[str, int]]:
    """The host's own picture by sample(model), and {layer: calls} of one pass of the network."""
    with Watch(model) as watch:
        picture = sample(model)
    return picture, watch.passes[0][1]


def reused_as_computed(
    model: Any, name: str, kind: str, theirs: Tensor, layers: dict[str, int], sample: Any = sample, **options: Any
) -> list[tuple[int, dict[str, int]]]:
    """Check a run with features of `kind` held against the host's own; returns its passes.

    theirs: the host's own picture; layers: {layer: calls} of one of its passes; sample: samples as `tiny.sample` does;
    options: of it.
    """
    model = attach(model, reusing(kind))
    with Watch(model) as watch:
        held = sample(model, name, sigmas=STILL, **options)
    assert actions(model) == ACTIONS, told(model)
    skipped = skipped_layers(name, kind, layers)
    reduced = {layer: n for layer, n in layers.items() if layer not in skipped}
    passes = watch.passes
    if kind in SPANS and not find_family(model.model.diffusion_model).known:
        assert passes.pop(1) == (0, reduced), "blocks that were found are checked once"
    assert skipped and len({len(calls) for _, calls in passes}) == 2
    for evaluation, calls in passes:
        assert calls == (layers if ACTIONS[evaluation] == "computed" else reduced)
    assert relative(held, theirs) < 1e-4
    return passes


def skipped_layers(name: str, kind: str, layers: Collection[str]) -> set[str]:
    """Those of `layers` that need not run when features of `kind` are reused."""
    if kind in SPANS:
        blocks = [f"{path}.{number}." for path in BLOCKS[name] for number in _span(path, kind, layers, BLOCKS[name])]
        return {layer for layer in layers if layer.startswith((*blocks, BESIDE.get((name, kind), "nothing")))}
    return {layer for layer in layers if re.search(ATTENTION[name][kind], layer)}


def _span(path: str, kind: str, layers: Collection[str], lists: Sequence[str]) -> list[str]:
    inside = [layer for layer in layers if layer.startswith(path + ".")]
    numbers = list(dict.fromkeys(re.match(rf"{re.escape(path)}\.(\w+)\.", layer)[1] for layer in inside))
    half, first = (len(numbers) + 1) // 2, int(path == lists[0])
    return {"front": numbers[first:half], "rear": numbers[max(half, first) :], "stack": numbers[first:]}[kind]


def shuffled_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the host run the branches together in one pass, or one by one in the other order, by turns."""
    calls, together = [], comfy.samplers.can_concat_cond

    def now_and_then(a: Any, b: Any) -> bool:
        calls.append(1)
        return a is b or (len(calls) % 3 == 0 and together(a, b))

    monkeypatch.setattr(comfy.samplers, "can_concat_cond", now_and_then)


@contextmanager
def out_of_memory(module: torch.nn.Module, *passes: int) -> Iterator[None]:
    """While open, the calls of `module` whose numbers are `passes` (all where none are given) run out of memory."""
    calls: list[int] = []

    def run_out(*_: Any) -> None:
        calls.append(1)
        if not passes or len(calls) in passes:
            raise torch.cuda.OutOfMemoryError("no room")

    hook = module.register_forward_pre_hook(run_out)
    try:
        yield
    finally:
        hook.remove()


def still_around(model: Any, percent: float) -> Tensor:
    """Sigmas that stand still on both sides of a part of sampling."""
    sampling = model.get_model_object("model_sampling")
    before, after, last = (float(sampling.percent_to_sigma(p)) for p in (percent - 0.2, percent + 0.2, 0.95))
    return torch.tensor([before] * 4 + [after] * 4 + [last, 0.0])


class Backend:
    """A backend of torch.compile that runs what was captured, and counts."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


def compiled(model: Any, backend: Any) -> Any:
    """TorchCompileModel, with the attention that leaves a network in one piece."""
    model = with_torch_attention(model)
    set_torch_compile_wrapper(model, backend=backend)
    return model


def with_torch_attention(model: Any) -> Any:
    """A clone of `model` whose attention is torch's own."""
    model = model.clone()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
    return model


def chosen_by_node(
    memory_gb: float = 0.0, forecast: str = "hold", depth: str = "automatic", dtype: str = "native"
) -> CacheSettings:
    """The settings that a node's inputs give."""
    inputs = {"feature_reuse": forecast, "reuse_depth": depth, "memory_gb": memory_gb, "memory_device": "same"}
    reuse = feature_settings(FasterCache, {**inputs, "memory_dtype": dtype}, None, Window())
    return CacheSettings("features", reuse=reuse)
