"""What a sampling run must do on real models of the host: skip what it says, and nothing else."""
import logging

import comfy.samplers
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.gate import GateSettings
from fastercache_pack.fastercache_core.guidance import GuidanceSettings
from fastercache_pack.fastercache_core.jump import JumpSettings
from fastercache_pack.fastercache_core.reading import Reading
from fastercache_pack.fastercache_core.reuse import ReuseSettings
from fastercache_pack.fastercache_core.schedule import Interval
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host import families
from fastercache_pack.nodes.host.attach import RUN_KEY, attach, last_report
from tiny import SPECS, conditioning, sample, self_attention

WITH_ATTENTION = ["sd3", "sd15", "sdxl"]
# Without a gate: random weights are too rough for it to open.
EXACT = CacheSettings("exact", GuidanceSettings(Interval(2), "blend"))
BALANCED = CacheSettings("balanced", GuidanceSettings(Interval(2), "blend"), jump=JumpSettings(Interval(2), "blend"))


def all_methods(every, window=Window()):
    interval = Interval(every, window)
    return CacheSettings("all", GuidanceSettings(interval), ReuseSettings({"self": interval}), JumpSettings(interval))


def reuse_only(weight="constant", every=2):
    return CacheSettings("reuse", reuse=ReuseSettings({"self": Interval(every)}, weight))


def totals(model):
    return last_report(model)["totals"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_with_nothing_skipped_the_picture_is_the_hosts_own_to_the_bit(tiny_models, name):
    model = tiny_models(name)
    full = sample(model, name, steps=4)
    for settings in (all_methods(every=1), all_methods(every=3, window=Window(1.0, 1.0))):
        assert torch.equal(sample(attach(model, settings), name, steps=4), full)
    assert torch.equal(sample(model, name, steps=4), full), "the model handed in must not be changed"


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_family_skips_network_rows_and_says_so(tiny_models, name):
    model = attach(tiny_models(name), BALANCED)
    full = sample(tiny_models(name), name, steps=10)
    result = sample(model, name, steps=10)
    assert totals(model)["evaluations"] == {"FULL": 7, "JUMP": 3}
    assert (totals(model)["rows"], totals(model)["rows_full"]) == (14, 20)
    assert torch.isfinite(result).all() and not torch.equal(result, full)


def test_at_cfg_1_cfg_cache_alone_changes_nothing_and_says_why(tiny_models):
    model = attach(tiny_models("sd3"), EXACT)
    assert torch.equal(sample(model, "sd3", cfg=1.0), sample(tiny_models("sd3"), "sd3", cfg=1.0))
    assert "no unconditional pass to skip" in last_report(model)["notes"][0]


def test_estimating_uncond_stays_close_to_full_sampling(tiny_models):
    full = sample(tiny_models("sd15"), "sd15", steps=20)
    estimated = sample(attach(tiny_models("sd15"), EXACT), "sd15", steps=20)
    other_seed = sample(tiny_models("sd15"), "sd15", steps=20, seed=4)
    assert relative(estimated, full) < 0.05 * relative(other_seed, full)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attention_runs_exactly_as_often_as_scheduled(tiny_models, name):
    model = attach(tiny_models(name), reuse_only())
    network = model.model.diffusion_model
    modules = self_attention(network)
    linears = [getattr(m, "qkv", None) or m.to_q for m in modules]
    calls = []
    hooks = [linear.register_forward_hook(lambda *_: calls.append(1)) for linear in linears]
    try:
        sample(model, name, steps=10)
    finally:
        for hook in hooks:
            hook.remove()
    computed = totals(model)["evaluations"]
    assert computed == {"FULL": 6, "REUSE": 4}
    assert len(calls) == 6 * len(linears)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_extrapolated_attention_is_nearer_to_full_than_held_attention(tiny_models, name):
    full = sample(tiny_models(name), name, steps=20)
    error = {w: relative(sample(attach(tiny_models(name), reuse_only(w)), name, steps=20), full)
             for w in ("hold", "constant")}
    assert 0 < error["constant"] < error["hold"]


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_held_attention_on_an_unchanged_input_gives_the_full_output(tiny_models, name):
    """Steps without length: the latent does not move, so what is held is what would be computed."""
    sigmas = torch.tensor([0.5] * 5 + [0.3, 0.0])
    full = sample(tiny_models(name), name, sigmas=sigmas)
    model = attach(tiny_models(name), reuse_only("hold", every=4))
    held = sample(model, name, sigmas=sigmas)
    assert totals(model)["evaluations"]["REUSE"] == 3
    assert relative(held, full) < 1e-4


@pytest.mark.parametrize("settings", [EXACT, BALANCED, all_methods(2)], ids=["exact", "balanced", "all"])
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_branches_that_the_host_runs_one_by_one_give_the_same_picture(tiny_models, name, settings, monkeypatch):
    batched = sample(attach(tiny_models(name), settings), name, steps=10)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    model = attach(tiny_models(name), settings)
    assert relative(sample(model, name, steps=10), batched) < 1e-4
    assert totals(model)["rows_full"] == 20


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch(tiny_models, name):
    model = attach(tiny_models(name), all_methods(2))
    noise = torch.randn((2, *SPECS[name]["lat"]), generator=torch.Generator().manual_seed(5))
    both = sample(model, name, steps=10, latent=noise, denoise=0.6)
    first = sample(model, name, steps=10, latent=noise[:1], denoise=0.6)
    assert relative(first, both[:1]) < 1e-4


def test_the_second_run_of_one_model_equals_the_first(tiny_models):
    model = attach(tiny_models("sd3"), all_methods(2))
    first, report = sample(model, "sd3", steps=10), totals(model)["evaluations"]
    sample(model, "sd3", steps=6, seed=9, latent=torch.zeros(2, 16, 8, 8))
    assert torch.equal(sample(model, "sd3", steps=10), first)
    assert totals(model)["evaluations"] == report


@pytest.mark.parametrize("failure", [InterruptedError, torch.cuda.OutOfMemoryError])
def test_a_run_that_fails_leaves_nothing_behind(tiny_models, failure):
    model = attach(tiny_models("sd3"), all_methods(2))
    full = sample(tiny_models("sd3"), "sd3")

    def fail(step, *_):
        if step == 4:
            raise failure("stopped")

    with pytest.raises(failure):
        sample(model, "sd3", callback=fail)
    network = model.model.diffusion_model
    touched = {"forward", "pre_attention", "post_attention"}
    assert not [m for m in network.modules() if touched & set(m.__dict__)]
    assert RUN_KEY not in model.model_options["transformer_options"]
    assert len(last_report(model)["evaluations"]) == 5
    assert torch.equal(sample(tiny_models("sd3"), "sd3"), full)


def test_where_forecasts_are_worth_nothing_nothing_is_skipped_and_that_is_said(tiny_models):
    model = attach(tiny_models("flux"), PRESETS["balanced"](Window()))
    assert torch.equal(sample(model, "flux", steps=10), sample(tiny_models("flux"), "flux", steps=10))
    assert totals(model)["cost"] == 1.0
    assert "not good enough" in last_report(model)["notes"][0]


@pytest.mark.parametrize("sampler, told", [("uni_pc", True), ("heun", True), ("euler", False), ("dpmpp_2m", False)])
def test_a_wish_that_this_sampler_cannot_go_down_to_is_said(tiny_models, sampler, told):
    model = attach(tiny_models("sd3"), PRESETS["fast"](Window()))
    sample(model, "sd3", sampler=sampler, steps=6)
    assert any("36 dB counts as 42 dB" in note for note in last_report(model)["notes"]) == told


@pytest.mark.parametrize("order", ["plain", "compile first", "compile last"])
def test_beside_torch_compile_the_host_never_waits_for_what_was_just_computed(tiny_models, monkeypatch, order):
    read, late = Reading.read, []
    monkeypatch.setattr(Reading, "read", lambda self, *about: late.append(self.late) or read(self, *about))
    settings, model = PRESETS["fast"](Window()), tiny_models("sd3")
    model = attach(compiled(model) if order == "compile first" else model, settings)
    model = compiled(model) if order == "compile last" else model
    sample(model, "sd3", steps=12)
    assert late and set(late) == {order != "plain"} and totals(model)["cost"] < 1.0


def compiled(model):
    set_torch_compile_wrapper(model, backend="eager")
    return model


def test_a_window_that_leaves_nothing_to_skip_is_said(tiny_models):
    model = attach(tiny_models("sd3"), all_methods(every=2, window=Window(1.0, 1.0)))
    sample(model, "sd3", steps=4)
    assert "left nothing to skip" in last_report(model)["notes"][0]


def test_at_cfg_1_the_gate_is_not_blamed(tiny_models):
    model = attach(tiny_models("sd3"), CacheSettings("cfg", GuidanceSettings(), gate=GateSettings()))
    sample(model, "sd3", cfg=1.0)
    assert [note[:26] for note in last_report(model)["notes"]] == ["no unconditional pass to s"]


def test_every_run_ends_with_one_line_in_the_log(tiny_models, caplog):
    with caplog.at_level(logging.INFO):
        sample(attach(tiny_models("sd3"), BALANCED), "sd3", steps=10)
    lines = [r.message for r in caplog.records if r.message.startswith("FasterCache")]
    assert len(lines) == 1 and "70% of the network rows run (7 FULL, 3 JUMP), 14 of 20 rows" in lines[0]


def test_two_cache_nodes_in_a_row_do_not_skip_twice(tiny_models):
    twice = attach(attach(tiny_models("sd3"), BALANCED), EXACT)
    once = attach(tiny_models("sd3"), EXACT)
    assert torch.equal(sample(twice, "sd3", steps=10), sample(once, "sd3", steps=10))


def test_beside_the_hosts_own_cache_ours_stands_down_and_says_so(tiny_models):
    easy = EasyCacheNode.execute(tiny_models("flux"), 0.2, 0.15, 0.95, False).result[0]
    model = attach(easy, BALANCED)
    assert torch.equal(sample(model, "flux", steps=10), sample(easy, "flux", steps=10))
    assert "EasyCache" in last_report(model)["notes"][0]


@pytest.mark.parametrize("sampler, note", [
    ("dpm_adaptive", "cannot be foreseen"), ("dpm_fast", "cannot be foreseen"),
    ("dpmpp_2m", "none is forecast"), ("euler_ancestral", "adds noise")])
def test_samplers_that_cannot_be_forecast_are_refused_with_the_reason(tiny_models, sampler, note):
    model = attach(tiny_models("sd15"), BALANCED)
    assert torch.isfinite(sample(model, "sd15", sampler=sampler, steps=6)).all()
    assert "JUMP" not in totals(model)["evaluations"]
    assert any(note in n for n in last_report(model)["notes"])


def test_a_model_of_no_known_family_gets_the_rest_and_a_note(tiny_models, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ())
    model = attach(tiny_models("flux"), PRESETS["paper"](Window()))
    sample(model, "flux", steps=12)
    assert totals(model)["evaluations"]["ESTIMATE"] > 0
    assert "Flux is no model that feature reuse knows: only its attention is reused" in last_report(model)["notes"][0]


def test_where_attention_cannot_be_taken_alone_blocks_are_reused_and_the_report_says_so(tiny_models):
    model = attach(tiny_models("flux"), reuse_only())
    sample(model, "flux", steps=12)
    assert totals(model)["evaluations"]["REUSE"] > 0
    assert "no self features that can be taken alone: front is reused instead" in last_report(model)["notes"][0]


def test_a_negative_that_ends_half_way_forces_a_full_evaluation(tiny_models):
    """The host guides against nothing from there on; an old difference would be wrong."""
    negative = conditioning("sd3", 2, start_percent=0.0, end_percent=0.5)
    full = sample(tiny_models("sd3"), "sd3", steps=20, negative=negative)
    model = attach(tiny_models("sd3"), EXACT)
    result = sample(model, "sd3", steps=20, negative=negative)
    last_estimate = max(r["ordinal"] for r in last_report(model)["evaluations"] if "ESTIMATE" in r["actions"].values())
    assert last_estimate < 11
    assert relative(result, full) < 0.2


def test_sampling_in_two_parts_skips_in_both(tiny_models):
    model = attach(tiny_models("sd3"), EXACT)
    half = sample(model, "sd3", steps=20, start_step=0, last_step=10, force_full_denoise=False)
    assert totals(model)["evaluations"]["ESTIMATE"] == 3
    sample(model, "sd3", steps=20, start_step=10, last_step=20, latent=half, disable_noise=True)
    assert totals(model)["evaluations"]["ESTIMATE"] == 3
    assert last_report(model)["evaluations"][-1]["actions"]["uncond"] == "FULL"
