"""Feature reuse beside what else people put on a model: compile, LoRA, ControlNet, patches, guidance, low memory.

Most tests let the latent stand still, so that what is held must be what the host itself computes.
"""

import shutil

import comfy.sd
import pytest
import torch
import torch._dynamo
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_freelunch, nodes_model_downscale, nodes_slg, nodes_tomesd
from fastercache_pack.fastercache_core.report import full_text
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import (
    ACTIONS,
    ALL_COMPUTED,
    STILL,
    Backend,
    Watch,
    compiled,
    reusing,
    still_around,
    told,
    with_torch_attention,
)
from support.guidance import Controlled, area, hooked, lora
from support.runs import actions, relative
from support.tiny import conditioning, sample


def held_is_computed(make, name, *kinds, expected=ACTIONS, **options):
    """Sample the model that `make` gives, without and with reuse: the same picture, the expected actions."""
    theirs = sample(make(), name, sigmas=STILL, **options)
    model = attach(make(), reusing(*kinds))
    result = sample(model, name, sigmas=STILL, **options)
    assert actions(model) == expected, told(model)
    assert relative(result, theirs) < 1e-4
    return theirs, result, model


@pytest.mark.parametrize(
    "name, kind, order",
    [
        ("wan", "self", "compile first"),
        ("flux", "stack", "compile last"),
        ("sd3", "self", "compile first"),
        ("sd3", "stack", "as a patch"),
    ],
)
def test_a_compiled_model_stays_compiled_and_gives_the_same_picture(tiny_models, name, kind, order):
    options = dict(sigmas=torch.linspace(0.9, 0.0, 9), cfg=1.0)
    eager = attach(tiny_models(name), reusing(kind, every=2))
    plain = sample(eager, name, **options)
    torch._dynamo.reset()
    backend, settings = Backend(), reusing(kind, every=2)
    if order == "compile first":
        model = attach(compiled(tiny_models(name), backend), settings)
    elif order == "as a patch":  # as other nodes do
        model = attach(with_torch_attention(tiny_models(name)), settings)
        network = torch.compile(model.get_model_object("diffusion_model"), backend=backend)
        model.add_object_patch("diffusion_model", network)
    else:
        model = compiled(attach(tiny_models(name), settings), backend)
    result = sample(model, name, **options)
    assert actions(model) == actions(eager) and "reused" in actions(model)
    assert relative(result, plain) < 1e-4
    first = backend.graphs
    assert backend.calls >= len(actions(model)), "it is compiled code that runs"
    sample(model, name, **options)
    torch._dynamo.reset()
    assert first <= 40 and backend.graphs <= 2 * first, "each of the two kinds of passes is traced once a run"


@pytest.mark.skipif(not shutil.which("g++"), reason="torch's own compiler needs a C++ compiler")
def test_a_model_compiled_to_machine_code_gives_the_same_picture(tiny_models):
    """By inductor, the compiler that people use."""
    options = dict(sigmas=torch.linspace(0.9, 0.0, 7), cfg=1.0)
    eager = attach(tiny_models("wan"), reusing("stack", every=2))
    plain = sample(eager, "wan", **options)
    torch._dynamo.reset()
    model = attach(compiled(tiny_models("wan"), "inductor"), reusing("stack", every=2))
    result = sample(model, "wan", **options)
    torch._dynamo.reset()
    assert actions(model) == actions(eager) and "reused" in actions(model)
    assert relative(result, plain) < 1e-3 < relative(sample(tiny_models("wan"), "wan", **options), plain)


@pytest.mark.parametrize("name, kind", [("sd15", "self"), ("sd15", "deep"), ("flux", "stack"), ("wan", "cross")])
def test_a_lora(tiny_models, name, kind):
    before = sample(tiny_models(name), name, sigmas=STILL)
    weights = lora(tiny_models(name))

    def make():
        return comfy.sd.load_lora_for_models(tiny_models(name), None, weights, 1.0, 0.0)[0]

    theirs, _, _ = held_is_computed(make, name, kind)
    assert relative(theirs, before) > 0.01, "the LoRA acts"
    assert torch.equal(sample(tiny_models(name), name, sigmas=STILL), before), "the weights are the model's again"


CHANGE_AT_4 = ["computed", "reused", "reused", "reused"] * 2 + ["computed"]


@pytest.mark.parametrize("kind", ["self", "stack"])
def test_a_lora_of_one_conditioning_that_changes_its_strength_forces_full_evaluations(tiny_models, kind):
    """Also where the interval would still allow to reuse: the network is another one from there on."""
    name = "sd15" if kind == "self" else "flux"
    weak = hooked(tiny_models(name), conditioning(name, 1), [(1.0, 0.0, 1), (0.2, 0.5, 1)])
    sigmas = still_around(tiny_models(name), 0.5)
    theirs = sample(tiny_models(name), name, sigmas=sigmas, positive=weak)
    model = attach(tiny_models(name), reusing(kind, every=6))
    result = sample(model, name, sigmas=sigmas, positive=weak)
    assert relative(result, theirs) < 1e-4
    assert actions(model) == CHANGE_AT_4


@pytest.mark.parametrize("only_positive", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "deep", "branch"])
def test_a_controlnet_on_a_unet(tiny_models, kind, only_positive):
    """With deep, the residuals of the blocks that do not run are left out."""
    control = Controlled(only_positive=only_positive)
    theirs, _, _ = held_is_computed(
        lambda: tiny_models("sd15"), "sd15", kind, **control.options, latent=torch.zeros(1, 4, 8, 8)
    )
    without = sample(tiny_models("sd15"), "sd15", sigmas=STILL, latent=torch.zeros(1, 4, 8, 8))
    assert relative(theirs, without) > 0.01, "the ControlNet acts"


@pytest.mark.parametrize("kind", ["self", "cross", "deep", "branch"])
def test_attention_patches_as_ip_adapters_install_them(tiny_models, kind):
    """A replaced attention is not ours to reuse: that block's runs, the others are reused."""
    calls = []

    def make():
        model = tiny_models("sd15")
        model.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v * 1.3))

        def replace(q, k, v, extra):
            calls.append(1)
            return optimized_attention(q, k, v, extra["n_heads"]) * 0.7

        model.set_model_attn2_replace(replace, "input", 1)
        model.set_model_attn2_replace(replace, "middle", 0)
        return model

    theirs, _, _ = held_is_computed(make, "sd15", kind)
    assert relative(theirs, sample(tiny_models("sd15"), "sd15", sigmas=STILL)) > 0.01, "the patches act"
    full, reuse = len(ACTIONS) * 2, ACTIONS.count("computed") * 2
    expected = {"self": full, "cross": full, "deep": len(ACTIONS) + ACTIONS.count("computed"), "branch": reuse}[kind]
    assert len(calls) == full + expected


def test_where_every_attention_is_replaced_nothing_is_reused_and_that_is_said(tiny_models):
    def make():
        model = tiny_models("sd15")
        for block, number in [("input", 1), ("input", 3), ("middle", 0), *[("output", i) for i in range(4)]]:
            model.set_model_attn2_replace(lambda q, k, v, extra: q * 0.7, block, number)
        return model

    _, _, model = held_is_computed(make, "sd15", "cross", expected=ALL_COMPUTED)
    assert "no cross feature was found" in told(model)


@pytest.mark.parametrize("kind", ["self", "stack", "rear"])
def test_the_extra_pass_of_skip_layer_guidance_is_left_alone(tiny_models, kind):
    """It runs the network again with other blocks: nothing of it is stored, nothing is put into it."""

    def make():
        return nodes_slg.SkipLayerGuidanceDiT.execute(tiny_models("sd3"), 3.0, 0.0, 1.0, "1", "").result[0]

    theirs, _, model = held_is_computed(make, "sd3", kind)
    assert relative(theirs, sample(tiny_models("sd3"), "sd3", sigmas=STILL)) > 0.01, "it acts"
    with Watch(model) as watch:
        sample(model, "sd3", sigmas=STILL)
    first, extra = [calls for _, calls in watch.passes[2:4]]
    layer = "joint_blocks.2.x_block.attn.qkv"
    assert layer not in first and layer in extra, "in an evaluation that reuses, the extra pass runs"


def louder(args, extra):
    """Another node's block: the host's own, and more of it."""
    out = extra["original_block"](args)
    return {**out, "img": out["img"] * 1.2}


def left_out(args, extra):
    return {"img": args["img"], "txt": args["txt"]}


@pytest.mark.parametrize("patch", [louder, left_out])
@pytest.mark.parametrize(
    "number, kinds", [(1, ("stack", "front", "rear")), (0, ("stack", "rear")), (3, ("stack", "front"))]
)
def test_a_block_that_another_node_replaces(tiny_models, patch, number, kinds):
    """Inside a span, as its first or as its last block."""

    def make():
        model = tiny_models("wan_vace")
        model.set_model_patch_replace(
            lambda args, extra: {k: v for k, v in patch({"txt": None, **args}, extra).items() if k == "img"},
            "dit",
            "double_block",
            number,
        )
        return model

    for kind in kinds:
        ends_span = patch is left_out and (kind, number) in {("stack", 3), ("stack", 1), ("front", 1)}
        held_is_computed(make, "wan_vace", kind, expected=ALL_COMPUTED if ends_span else ACTIONS)


@pytest.mark.parametrize("where", ["patches_replace", "patches"])
def test_features_from_before_another_node_changed_its_patches_are_not_reused(tiny_models, where):
    """Within one run: a node that acts on a part of sampling only."""

    def change(executor, *args, **kwargs):
        if args[1].flatten()[0] < border:
            options = dict(args[5])
            if where == "patches_replace":
                options[where] = {"dit": {("double_block", 1): louder}}
            else:
                options[where] = {"attn1_patch": [scale]}
            args = (*args[:5], options, *args[6:])
        return executor(*args, **kwargs)

    name, kind = ("flux", "stack") if where == "patches_replace" else ("sd15", "self")

    def scale(q, k, v, extra):
        return q, k, v * 1.5

    border = float(tiny_models(name).get_model_object("model_sampling").percent_to_sigma(0.5))

    def make():
        model = tiny_models(name)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "change", change)
        return model

    sigmas = still_around(tiny_models(name), 0.5)
    theirs = sample(make(), name, sigmas=sigmas)
    assert relative(theirs, sample(tiny_models(name), name, sigmas=sigmas)) > 0.001, "the patch acts"
    model = attach(make(), reusing(kind, every=6))
    assert relative(sample(model, name, sigmas=sigmas), theirs) < 1e-4
    assert actions(model) == CHANGE_AT_4


@pytest.mark.parametrize("kind", ["self", "cross", "deep", "branch"])
def test_conditionings_of_areas(tiny_models, kind):
    """Chunks of several sizes; the host gives the negative's copies the positive's identity."""
    positive = conditioning("sd15", 1) + area(conditioning("sd15", 6), 0, 0) + area(conditioning("sd15", 7), 8, 8)
    held_is_computed(lambda: tiny_models("sd15"), "sd15", kind, positive=positive)


def test_token_merging_hands_tokens_across_the_attention_so_that_always_runs(tiny_models):
    def make():
        return nodes_tomesd.TomePatchModel.execute(tiny_models("sd15"), 0.5).result[0]

    model = attach(make(), reusing("self"))
    torch.manual_seed(0)
    result = sample(model, "sd15", sigmas=STILL)
    torch.manual_seed(0)
    assert torch.equal(result, sample(make(), "sd15", sigmas=STILL))
    assert actions(model) == ALL_COMPUTED and "inside of self features" in told(model)


@pytest.mark.parametrize("kind, expected", [("deep", ALL_COMPUTED), ("self", ACTIONS), ("branch", ACTIONS)])
def test_freeu_works_on_the_inside_of_a_unet_so_that_always_runs(tiny_models, kind, expected):
    def make():
        return nodes_freelunch.FreeU_V2().patch(tiny_models("sd15"), 1.3, 1.4, 0.9, 0.2)[0]

    _, _, model = held_is_computed(make, "sd15", kind, expected=expected)
    assert ("inside of deep features" in told(model)) == (kind == "deep")


@pytest.mark.parametrize("kind", ["deep", "self", "cross", "branch"])
def test_where_another_node_computes_blocks_smaller_for_a_while(tiny_models, kind):
    """Deep shrink: features from then have another shape than what is needed afterwards."""

    def make():
        return nodes_model_downscale.PatchModelAddDownscale.execute(
            tiny_models("sd15"), 1, 2.0, 0.0, 0.5, True, "bicubic", "bicubic"
        ).result[0]

    sigmas = still_around(tiny_models("sd15"), 0.5)
    theirs = sample(make(), "sd15", sigmas=sigmas)
    assert relative(theirs, sample(tiny_models("sd15"), "sd15", sigmas=sigmas)) > 0.001, "it acts"
    model = attach(make(), reusing(kind, every=4))
    assert relative(sample(model, "sd15", sigmas=sigmas), theirs) < 1e-4
    assert ("reused" in actions(model)) == (kind != "deep")
    across = attach(make(), reusing(kind, every=6))
    assert torch.isfinite(sample(across, "sd15", sigmas=sigmas)).all(), "the interval reaches across the change"
    past = attach(make(), reusing(kind, every=2, weight="fitted", dtype="fp8"))
    assert torch.isfinite(sample(past, "sd15", steps=16, scheduler="normal")).all(), "so does the past"


@pytest.mark.parametrize("name, kind", [("sd15", "self"), ("flux", "stack"), ("wan", "self")])
def test_weights_that_are_brought_to_the_device_layer_by_layer(tiny_models, name, kind):
    """Low VRAM: the host sets this on the layers that stay in main memory."""
    layers = [m for m in tiny_models(name).model.diffusion_model.modules() if hasattr(m, "comfy_cast_weights")]
    before = [layer.comfy_cast_weights for layer in layers]
    try:
        for layer in layers[::2]:
            layer.comfy_cast_weights = True
        held_is_computed(lambda: tiny_models(name), name, kind)
    finally:
        for layer, value in zip(layers, before):
            layer.comfy_cast_weights = value


def test_the_report_tells_what_is_kept_and_where(tiny_models, caplog):
    with caplog.at_level("INFO"):
        model = attach(tiny_models("sd15"), reusing("self", "cross", budget=10**9, dtype="fp16"))
        sample(model, "sd15", sigmas=STILL)
    features = last_report(model)["run"]["features"]
    assert features["sites"] == features["of"] == 14 and features["kinds"] == ["self", "cross"]
    assert features["dtype"] == "fp16" and features["device"] == "cpu"
    assert features["bytes"] == last_report(model)["totals"]["peak_cache_bytes"]["cpu"]
    [line] = [r.message for r in caplog.records if "sites" in r.message]
    blocks = "input_blocks 1, 3 of 4, middle_block 1 of 3, output_blocks 0-3 of 4"
    assert features["blocks"]["self"] == {
        "input_blocks": "1, 3 of 4",
        "middle_block": "1 of 3",
        "output_blocks": "0-3 of 4",
    }
    megabytes = f"{features['bytes'] / 1e6:.1f} MB of 1000.0 MB on cpu, fp16"
    expected = f"14 of 14 sites (self: {blocks}; cross: {blocks}): {megabytes}"
    assert f"features of {expected}" in line and f"features: {expected}" in full_text(last_report(model))


def tiled(model):
    """A model whose network runs on the left and on the right half of the latent in turn, as tiling nodes do."""

    def halves(apply_model, told):
        x, options = told["input"], told["c"]
        return torch.cat([apply_model(part, told["timestep"], **options) for part in x.chunk(2, -1)], -1)

    model = model.clone()
    model.set_model_unet_function_wrapper(halves)
    return model


@pytest.mark.parametrize("name, kind", [("sd15", "self"), ("sd15", "deep"), ("sd3", "stack"), ("wan", "self")])
def test_tiles_of_one_picture_have_their_own_features(tiny_models, name, kind):
    held_is_computed(lambda: tiled(tiny_models(name)), name, kind)


def test_models_unloaded_in_the_middle_of_a_run_come_back_with_their_features(tiny_models):
    def unload(step, *_):
        if step == 3:
            comfy.model_management.unload_all_models()

    held_is_computed(lambda: tiny_models("sd15"), "sd15", "self", callback=unload)
