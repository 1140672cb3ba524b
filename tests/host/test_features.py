"""Feature reuse on every model family: exactly what is said runs, and what comes from the cache is right."""
import functools
import re
from contextlib import contextmanager

import comfy.context_windows
import comfy.controlnet
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from fastercache_pack.fastercache_core.reuse import ReuseSettings
from fastercache_pack.fastercache_core.schedule import Interval
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.fastercache_core.storage import StorageSettings
from fastercache_pack.nodes.host.attach import attach, last_report
from fastercache_pack.nodes.host.families import find_family
from tiny import SPECS, conditioning, sample

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

# Steps without length: the latent does not move, so what is held is what would be computed. The step that follows the
# last reuse has a length, so that the picture tells what was held.
STILL = torch.tensor([0.5] * 3 + [0.3, 0.2, 0.0])
ACTIONS = ["FULL", "REUSE", "REUSE", "FULL", "FULL"]


def reusing(*kinds, every=3, weight="hold", **storage):
    return CacheSettings("features", reuse=ReuseSettings(dict.fromkeys(kinds, Interval(every)), weight,
                                                         storage=StorageSettings(**storage)))


@contextmanager
def second_pass_runs_out_of_memory(model):
    """While open, the second pass through a Flux network fails near its end."""
    calls = []

    def run_out(*_):
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("no room")

    hook = model.model.diffusion_model.final_layer.register_forward_pre_hook(run_out)
    try:
        yield
    finally:
        hook.remove()


def host_picture(model, sample):
    """The host's own picture by sample(model), and {layer: calls} of one pass of the network."""
    with Watch(model) as watch:
        picture = sample(model)
    return picture, watch.passes[0][1]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def actions(model):
    return [record["actions"]["cond"] for record in last_report(model)["evaluations"]]


def notes(model):
    return "; ".join(last_report(model)["notes"])


@pytest.fixture(scope="module")
def full(tiny_models):
    """The host's own picture, by family: two different latents, and the layers of the network that run."""
    return functools.cache(
        lambda name: host_picture(tiny_models(name), lambda model: sample(model, name, sigmas=STILL, batch=2)))


class Watch:
    """Which layers run, and how often, in every pass of the network: [(evaluation, {layer: calls})]."""

    def __init__(self, model):
        self.evaluation, self.passes, self.hooks = -1, [], []
        self.model = model
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", self._predict_noise)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", self._apply_model)

    def __enter__(self):
        for name, module in self.model.model.diffusion_model.named_modules():
            if not list(module.children()) and list(module.parameters(recurse=False)):
                self.hooks.append(module.register_forward_pre_hook(functools.partial(self._count, name)))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _count(self, name, *_):
        calls = self.passes[-1][1]
        calls[name] = calls.get(name, 0) + 1

    def _predict_noise(self, executor, *args, **kwargs):
        self.evaluation += 1
        return executor(*args, **kwargs)

    def _apply_model(self, executor, *args, **kwargs):
        self.passes.append((self.evaluation, {}))
        return executor(*args, **kwargs)


def skipped_layers(name, kind, layers):
    """Those of `layers` that need not run when features of `kind` are reused."""
    if kind in SPANS:
        blocks = [f"{path}.{number}." for path in BLOCKS[name] for number in _span(path, kind, layers, BLOCKS[name])]
        return {layer for layer in layers if layer.startswith((*blocks, BESIDE.get((name, kind), "nothing")))}
    return {layer for layer in layers if re.search(ATTENTION[name][kind], layer)}


def _span(path, kind, layers, lists):
    numbers = list(dict.fromkeys(re.match(rf"{re.escape(path)}\.(\w+)\.", layer)[1] for layer in layers
                                 if layer.startswith(path + ".")))
    half, first = (len(numbers) + 1) // 2, int(path == lists[0])
    return {"front": numbers[first:half], "rear": numbers[max(half, first):], "stack": numbers[first:]}[kind]


def shuffled_batches(monkeypatch):
    """Make the host run the branches together in one pass, or one by one in the other order, now so, now so."""
    calls, together = [], comfy.samplers.can_concat_cond

    def now_and_then(a, b):
        calls.append(1)
        return a is b or (len(calls) % 3 == 0 and together(a, b))

    monkeypatch.setattr(comfy.samplers, "can_concat_cond", now_and_then)


@pytest.mark.parametrize("name, kind", CASES)
def test_what_is_reused_does_not_run_and_is_what_would_have_been_computed(tiny_models, full, monkeypatch, name, kind):
    """Two branches whose features stand still and differ, two different latents in a batch, batched anyhow.

    Whatever crossed over, was stored wrongly or was written to by the host would show.
    """
    theirs, layers = full(name)
    shuffled_batches(monkeypatch)
    passes = reused_as_computed(tiny_models(name), name, kind, theirs, layers, batch=2)
    assert len(passes) > len(ACTIONS), "some evaluations were run one by one"


def reused_as_computed(model, name, kind, theirs, layers, sample=sample, **options):
    """Check a run with features of `kind` held against the host's own; returns its passes.

    theirs: the host's own picture; layers: {layer: calls} of one of its passes; sample: samples as `tiny.sample` does;
    options: of it.
    """
    model = attach(model, reusing(kind))
    with Watch(model) as watch:
        held = sample(model, name, sigmas=STILL, **options)
    assert actions(model) == ACTIONS, notes(model)
    skipped = skipped_layers(name, kind, layers)
    assert skipped and len({len(calls) for _, calls in watch.passes}) == 2
    for evaluation, calls in watch.passes:
        expected = {layer: n for layer, n in layers.items() if ACTIONS[evaluation] == "FULL" or layer not in skipped}
        assert calls == expected
    assert relative(held, theirs) < 1e-4
    return watch.passes


@pytest.mark.parametrize("name", list(SPECS))
def test_storing_changes_nothing(tiny_models, full, name):
    """Every evaluation is computed and stored, of several kinds at once: the host's own picture, to the bit."""
    theirs, _ = full(name)
    kinds = [kind for n, kind in CASES if n == name]
    others = [kind for kind in kinds if kind != "stack"]  # the halves of the same blocks
    for together in [others, ["stack"]] if "stack" in kinds else [others]:
        model = attach(tiny_models(name), reusing(*together, every=1))
        assert torch.equal(sample(model, name, sigmas=STILL, batch=2), theirs)
        assert last_report(model)["run"]["features"]["sites"] > 0, "it did store"


@pytest.mark.parametrize("name", list(SPECS))
def test_the_branches_and_the_latents_of_these_tests_differ_and_the_model_is_left_as_it_was(tiny_models, full, name):
    theirs, _ = full(name)
    swapped = sample(tiny_models(name), name, sigmas=STILL, batch=2, negative=conditioning(name, 1))
    assert relative(swapped, theirs) > 0.003, "guidance acts"
    assert relative(theirs[:1], theirs[1:]) > 0.01
    assert torch.equal(sample(tiny_models(name), name, sigmas=STILL, batch=2), theirs)


def test_every_kind_of_every_family_is_tested(tiny_models):
    for name in SPECS:
        family = find_family(tiny_models(name).model.diffusion_model)
        assert family.kinds() == {kind for n, kind in CASES if n == name}, name


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that gives a residual to every block, without a network."""

    def __init__(self, shapes, seed=0):
        super().__init__()
        self.shapes, self.seed, self.given = shapes, seed, []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        if self.timestep_range and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
            return None
        g = torch.Generator().manual_seed(self.seed)
        control = {place: [torch.randn(1, *shape, generator=g).repeat(len(x_noisy), 1, 1) for _ in range(count)]
                   for place, (count, shape) in self.shapes.items()}
        self.given.append(control)
        return control

    def on(self, cond, end=1.0):
        """The conditioning under this ControlNet, up to a part of sampling."""
        self.timestep_percent_range = (0.0, end)
        return [[tensor, {**fields, "control": self, "control_apply_to_uncond": False}] for tensor, fields in cond]


CONTROLLED = {
    "flux": {"input": (2, (64, 64)), "output": (3, (64, 64))},
    "chroma": {"input": (2, (64, 64)), "output": (3, (64, 64))},
    "hunyuan": {"input": (2, (192, 128)), "output": (2, (192, 128))},
    "qwen": {"input": (3, (64, 64))},
    "sd3": {"output": (3, (64, 192))},
}


@pytest.mark.parametrize("name, kind", [case for case in CASES if case[0] in CONTROLLED])
def test_what_the_host_adds_in_place_does_not_reach_the_cache(tiny_models, full, name, kind):
    """ControlNet residuals are added between the blocks, onto the very tensors that these return."""
    control = Residuals(CONTROLLED[name])
    conds = {who: control.on(conditioning(name, seed)) for who, seed in (("positive", 1), ("negative", 2))}
    theirs = sample(tiny_models(name), name, sigmas=STILL, batch=2, **conds)
    assert relative(theirs, full(name)[0]) > 0.01, "the residuals act"
    model = attach(tiny_models(name), reusing(kind))
    assert relative(sample(model, name, sigmas=STILL, batch=2, **conds), theirs) < 1e-4
    assert actions(model) == ACTIONS
    before = Residuals(CONTROLLED[name]).get_control(torch.zeros(4), [0.5], None, 2, {})
    for given in control.given:
        for place, values in given.items():
            assert all(torch.equal(a, b) for a, b in zip(values, before[place])), "the ControlNet's own tensors"


def test_where_a_controlnet_ends_features_from_before_are_not_reused(tiny_models):
    """They hold its residuals."""
    conds = {}
    for who, seed in (("positive", 1), ("negative", 2)):
        conds[who] = Residuals(CONTROLLED["flux"]).on(conditioning("flux", seed), end=0.5)
    model = attach(tiny_models("flux"), reusing("stack", every=6))
    border = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    sigmas = torch.tensor([border + 0.1] * 4 + [border - 0.1] * 4 + [0.1, 0.0])
    theirs = sample(tiny_models("flux"), "flux", sigmas=sigmas, **conds)
    result = sample(model, "flux", sigmas=sigmas, **conds)
    assert actions(model) == ["FULL", *["REUSE"] * 3, "FULL", *["REUSE"] * 3, "FULL"]
    assert relative(result, theirs) < 1e-4


@pytest.mark.parametrize("name, kind, dtype", [("sd15", "self", "fp16"), ("sd3", "self", "native"),
                                               ("flux", "front", "fp8"), ("wan", "cross", "fp8")])
def test_the_budget_is_kept_to_the_byte(tiny_models, name, kind, dtype):
    """Exactly what is held is promised; a byte less, and one site less is kept."""
    def run(budget):
        model = attach(tiny_models(name), reusing(kind, every=2, weight="constant", budget=budget, dtype=dtype))
        return sample(model, name, sigmas=STILL), model, last_report(model)["run"]["features"]

    _, _, every = run(None)
    assert every["sites"] == every["of"] and every["dtype"] == dtype and every["device"] == "cpu"
    _, model, exact = run(every["bytes"])
    assert (exact["sites"], exact["bytes"]) == (every["of"], every["bytes"])
    assert sum(last_report(model)["totals"]["peak_cache_bytes"].values()) == every["bytes"]
    _, model, less = run(every["bytes"] - 1)
    assert less["sites"] == every["of"] - 1 and less["of"] == every["of"] and less["bytes"] < every["bytes"]
    assert sum(last_report(model)["totals"]["peak_cache_bytes"].values()) == less["bytes"]
    assert ("REUSE" in actions(model)) == (less["sites"] > 0)


@pytest.mark.parametrize("name, kind", [("sd15", "deep"), ("sd3", "self"), ("flux", "stack"), ("wan", "self")])
def test_without_room_everything_runs_and_the_report_says_why(tiny_models, name, kind):
    model = attach(tiny_models(name), reusing(kind, budget=1))
    assert torch.equal(sample(model, name, sigmas=STILL), sample(tiny_models(name), name, sigmas=STILL))
    assert set(actions(model)) == {"FULL"}
    [note] = last_report(model)["notes"]
    assert f"no {kind} feature fits" in note and "memory_gb" in note
    assert last_report(model)["totals"]["peak_cache_bytes"] == {}


def test_a_network_without_such_places_says_so(tiny_models, monkeypatch):
    """A UNet of one level has nothing below its first downsampling."""
    monkeypatch.setitem(SPECS, "one level", {**SPECS["sd15"], "cfg": {
        **SPECS["sd15"]["cfg"], "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1],
        "transformer_depth_output": [1, 1]}})
    model = attach(tiny_models("one level"), reusing("deep"))
    sample(model, "one level", sigmas=STILL)
    assert set(actions(model)) == {"FULL"}
    assert "no deep feature was found" in notes(model)


def windowed(model, schedule="standard_static"):
    model = model.clone()
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule(schedule),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=3, context_overlap=1, context_stride=1, closed_loop=False, dim=2)
    return model


@pytest.mark.parametrize("kind", ["self", "stack"])
def test_each_context_window_of_a_long_video_has_its_own_features(tiny_models, kind):
    options = dict(latent=torch.zeros(1, 16, 7, 8, 8), sigmas=STILL)
    theirs = sample(windowed(tiny_models("wan")), "wan", **options)
    model = attach(windowed(tiny_models("wan")), reusing(kind))
    assert relative(sample(model, "wan", **options), theirs) < 1e-4
    assert actions(model) == ACTIONS


def test_windows_that_move_on_do_not_fill_the_memory(tiny_models):
    """Where no window comes back, nothing is reused, and what is held stays what a few evaluations leave."""
    options = dict(latent=torch.zeros(1, 16, 9, 8, 8), sigmas=torch.linspace(0.9, 0.0, 13))
    model = attach(windowed(tiny_models("wan"), "standard_uniform"), reusing("stack", every=2))
    assert torch.isfinite(sample(model, "wan", **options)).all()
    alone = attach(tiny_models("wan"), reusing("stack", every=2))
    sample(alone, "wan", latent=torch.zeros(1, 16, 3, 8, 8), sigmas=torch.linspace(0.9, 0.0, 13))
    one = sum(last_report(alone)["totals"]["peak_cache_bytes"].values())
    assert sum(last_report(model)["totals"]["peak_cache_bytes"].values()) < 5 * 5 * one, "5 windows, 5 evaluations"


def test_several_kinds_each_keep_their_own_interval(tiny_models):
    settings = ReuseSettings({"self": Interval(2), "cross": Interval(3)}, "hold")
    model = attach(tiny_models("wan"), CacheSettings("both", reuse=settings))
    with Watch(model) as watch:
        sample(model, "wan", sigmas=torch.tensor([0.5] * 7 + [0.3, 0.0]))
    ran = {part: [any(part in layer for layer in calls) for _, calls in watch.passes]
           for part in ("self_attn", "cross_attn")}
    assert ran["self_attn"] == [True, False, True, False, True, False, True, True]
    assert ran["cross_attn"] == [True, False, False, True, False, False, True, True]


def test_a_pass_that_runs_out_of_memory_is_run_again_without_features(tiny_models):
    """What the cache holds must not cost the picture."""
    theirs = sample(tiny_models("flux"), "flux", sigmas=STILL)
    model = attach(tiny_models("flux"), reusing("stack"))
    with second_pass_runs_out_of_memory(model):
        assert relative(sample(model, "flux", sigmas=STILL), theirs) < 1e-5
    assert set(actions(model)) == {"FULL"} and "memory ran out" in notes(model)


def test_out_of_memory_without_any_features_is_the_hosts_own_matter(tiny_models):
    model = attach(tiny_models("flux"), reusing("stack", budget=1))

    def run_out(*_):
        raise torch.cuda.OutOfMemoryError("no room")

    hook = model.model.diffusion_model.final_layer.register_forward_pre_hook(run_out)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            sample(model, "flux", sigmas=STILL)
    finally:
        hook.remove()
