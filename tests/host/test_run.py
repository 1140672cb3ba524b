"""What a sampling run must do on real models of the host: skip what it says, and nothing else."""

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.controlnet
import comfy.samplers
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Interval, Window
from fastercache_pack.fastercache_core.controllers.adaptive import AdaptiveSettings
from fastercache_pack.fastercache_core.controllers.interval import IntervalSettings
from fastercache_pack.fastercache_core.controllers.planned import MixSettings
from fastercache_pack.fastercache_core.features.probe import Probe
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings, planned_reuse
from fastercache_pack.fastercache_core.readback import Readback
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.fastercache_core.signal import DifferenceSettings, OutputSettings
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host import calibrate, families, wrappers
from fastercache_pack.nodes.host.wrappers import RUN_KEY, attach, last_report

from support.guidance import cfg_cache, with_steps
from support.runs import actions, estimates, evaluations, notes, relative, totals
from support.tiny import SPECS, conditioning, sample, self_attention

WITH_ATTENTION = ["sd3", "sd15", "sdxl"]
# Whatever the error: random weights are too rough for any tolerance.
EXACT, BALANCED = cfg_cache(forecast="blend"), with_steps(forecast="blend")


def all_methods(every, window=Window()):
    interval = Interval(every, window)
    controller = IntervalSettings(interval, interval)
    return CacheSettings("all", controller, DifferenceSettings(), OutputSettings(), ReuseSettings({"self": interval}))


def reuse_only(weight="constant", every=2):
    return CacheSettings("reuse", reuse=ReuseSettings({"self": Interval(every)}, weight))


def adaptive_with_features(target=42.0):
    """The adaptive controller with features that it probes, where it may not predict steps and correct them."""
    reuse = ReuseSettings({"deep": Interval(2)}, "fitted")
    return CacheSettings("adaptive", AdaptiveSettings(target), DifferenceSettings(), OutputSettings(), reuse)


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
    assert evaluations(model) == {"computed": 7, "predicted": 3}
    assert (totals(model)["rows"], totals(model)["rows_full"]) == (14, 20)
    assert torch.isfinite(result).all() and not torch.equal(result, full)


def test_at_cfg_1_cfg_cache_alone_changes_nothing_and_says_why(tiny_models):
    model = attach(tiny_models("sd3"), EXACT)
    assert torch.equal(sample(model, "sd3", cfg=1.0), sample(tiny_models("sd3"), "sd3", cfg=1.0))
    assert notes(model) == [messages.NO_UNCOND]


def test_at_cfg_1_the_tolerance_is_not_blamed(tiny_models):
    model = attach(tiny_models("sd3"), cfg_cache(tolerance=16e-3))
    sample(model, "sd3", cfg=1.0)
    assert notes(model) == [messages.NO_UNCOND]


def test_estimating_uncond_stays_close_to_full_sampling(tiny_models):
    full = sample(tiny_models("sd15"), "sd15", steps=20)
    estimated = sample(attach(tiny_models("sd15"), EXACT), "sd15", steps=20)
    other_seed = sample(tiny_models("sd15"), "sd15", steps=20, seed=4)
    assert 0 < relative(estimated, full) < 0.05 * relative(other_seed, full)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attention_runs_exactly_as_often_as_scheduled(tiny_models, name):
    model = attach(tiny_models(name), reuse_only())
    modules = self_attention(model.model.diffusion_model)
    linears = [getattr(m, "qkv", None) or m.to_q for m in modules]
    calls = []
    hooks = [linear.register_forward_hook(lambda *_: calls.append(1)) for linear in linears]
    try:
        sample(model, name, steps=10)
    finally:
        for hook in hooks:
            hook.remove()
    assert evaluations(model) == {"computed": 6, "reused": 4}
    assert len(calls) == 6 * len(linears)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_extrapolated_attention_is_nearer_to_full_than_held_attention(tiny_models, name):
    full = sample(tiny_models(name), name, steps=20)
    error = {
        weight: relative(sample(attach(tiny_models(name), reuse_only(weight)), name, steps=20), full)
        for weight in ("hold", "constant")
    }
    assert 0 < error["constant"] < error["hold"]


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_held_attention_on_an_unchanged_input_gives_the_full_output(tiny_models, name):
    """Steps without length: the latent does not move, so what is held is what would be computed."""
    sigmas = torch.tensor([0.5] * 5 + [0.3, 0.0])
    full = sample(tiny_models(name), name, sigmas=sigmas)
    model = attach(tiny_models(name), reuse_only("hold", every=4))
    held = sample(model, name, sigmas=sigmas)
    assert evaluations(model)["reused"] == 3
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
    first, report = sample(model, "sd3", steps=10), evaluations(model)
    sample(model, "sd3", steps=6, seed=9, latent=torch.zeros(2, 16, 8, 8))
    assert torch.equal(sample(model, "sd3", steps=10), first)
    assert evaluations(model) == report


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


@pytest.mark.parametrize("fails", ["making the run", "the run", "nothing"])
def test_the_guider_gets_its_options_back_whatever_happens(tiny_models, monkeypatch, fails):
    """Other nodes hold on to a guider and use it again."""
    guider = comfy.samplers.CFGGuider(attach(tiny_models("sd3"), EXACT))
    before, seen = guider.model_options, []

    def fail(*_, **__):
        raise InterruptedError("stopped")

    class Executor:
        class_obj = guider

        def __call__(self, *args, **kwargs):
            seen.append(guider.model_options["transformer_options"])
            return fail() if fails == "the run" else "sampled"

    if fails == "making the run":
        monkeypatch.setattr(wrappers, "CacheRun", fail)
    noise, sampler, sigmas = torch.zeros(1, 16, 8, 8), comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0])
    if fails == "nothing":
        assert wrappers.outer_sample(Executor(), noise, noise, sampler, sigmas) == "sampled"
    else:
        with pytest.raises(InterruptedError):
            wrappers.outer_sample(Executor(), noise, noise, sampler, sigmas)
    assert guider.model_options is before and RUN_KEY not in before["transformer_options"]
    assert all(RUN_KEY in options for options in seen) and bool(seen) == (fails != "making the run")


def test_where_forecasts_are_poor_nothing_is_skipped_and_that_is_said(tiny_models):
    model = attach(tiny_models("flux"), PRESETS["balanced"](Window()))
    assert torch.equal(sample(model, "flux", steps=10), sample(tiny_models("flux"), "flux", steps=10))
    assert totals(model)["cost"] == 1.0
    assert messages.TOO_FEW_STEPS in notes(model)


@pytest.mark.parametrize(
    "sampler, said", [("gradient_estimation", True), ("heun", True), ("euler", False), ("dpmpp_2m", False)]
)
def test_a_target_that_a_sampler_cannot_serve_is_raised_and_that_is_said(tiny_models, sampler, said):
    model = attach(tiny_models("sd3"), PRESETS["fast"](Window()))
    sample(model, "sd3", sampler=sampler, steps=6)
    note = messages.below_target(36.0, 42.0, last_report(model)["run"]["sampler"])
    assert (note in notes(model)) == said


@pytest.mark.parametrize("order", ["plain", "compile first", "compile last"])
def test_beside_torch_compile_the_host_never_waits_for_what_was_just_computed(tiny_models, monkeypatch, order):
    read, late = Readback.read, []
    monkeypatch.setattr(Readback, "read", lambda self, *about: late.append(self.late) or read(self, *about))
    settings, model = PRESETS["fast"](Window()), tiny_models("sd3")
    model = attach(compiled(model) if order == "compile first" else model, settings)
    model = compiled(model) if order == "compile last" else model
    sample(model, "sd3", steps=30)
    assert late and set(late) == {order != "plain"} and totals(model)["cost"] < 1.0


def compiled(model):
    set_torch_compile_wrapper(model, backend="eager")
    return model


def test_a_window_that_leaves_nothing_to_skip_is_said(tiny_models):
    model = attach(tiny_models("sd3"), all_methods(every=2, window=Window(1.0, 1.0)))
    sample(model, "sd3", steps=4)
    assert messages.NOTHING_WITHIN_INTERVAL in notes(model)


def test_every_run_ends_with_one_line_in_the_log(tiny_models, caplog):
    with caplog.at_level(logging.INFO):
        sample(attach(tiny_models("sd3"), BALANCED), "sd3", steps=10)
    lines = [r.message for r in caplog.records if r.message.startswith("FasterCache")]
    assert len(lines) == 1 and "70% of the network rows run (7 computed, 3 predicted), 14 of 20 rows" in lines[0]


def test_two_cache_nodes_in_a_row_do_not_skip_twice(tiny_models):
    twice = attach(attach(tiny_models("sd3"), cfg_cache(5, forecast="hold")), EXACT)
    once = attach(tiny_models("sd3"), EXACT)
    assert torch.equal(sample(twice, "sd3", steps=10), sample(once, "sd3", steps=10))


def test_beside_the_hosts_own_cache_ours_stands_down_and_says_so(tiny_models):
    easy = EasyCacheNode.execute(tiny_models("flux"), 0.2, 0.15, 0.95, False).result[0]
    model = attach(easy, BALANCED)
    assert torch.equal(sample(model, "flux", steps=10), sample(easy, "flux", steps=10))
    assert notes(model)[0] == messages.EASYCACHE


@pytest.mark.parametrize(
    "sampler, note",
    [
        ("dpm_adaptive", messages.sampler_adapts),
        ("dpm_fast", messages.unknown_sampler),
        ("dpmpp_2m", messages.builds_on_differences),
        ("euler_ancestral", messages.adds_noise),
    ],
)
def test_samplers_whose_steps_cannot_be_predicted_are_refused_with_the_reason(tiny_models, sampler, note):
    model = attach(tiny_models("sd15"), BALANCED)
    assert torch.isfinite(sample(model, "sd15", sampler=sampler, steps=6)).all()
    assert "predicted" not in evaluations(model) and note(last_report(model)["run"]["sampler"]) in notes(model)


def test_a_model_of_no_known_family_gets_the_rest_and_a_note(tiny_models, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ())
    model = attach(tiny_models("flux"), PRESETS["paper"](Window()))
    sample(model, "flux", steps=12)
    assert estimates(model) > 0 and any("feature reuse does not know Flux" in note for note in notes(model))


def test_where_attention_cannot_be_taken_alone_blocks_are_reused_and_the_report_says_so(tiny_models):
    model = attach(tiny_models("flux"), reuse_only())
    sample(model, "flux", steps=12)
    assert evaluations(model)["reused"] > 0
    assert notes(model)[0] == messages.instead(families.find_family(model.model.diffusion_model).name, "self", "front")


def test_a_negative_that_ends_half_way_forces_a_full_evaluation(tiny_models):
    """The host guides against nothing from there on; an old difference would be wrong."""
    negative = conditioning("sd3", 2, start_percent=0.0, end_percent=0.5)
    full = sample(tiny_models("sd3"), "sd3", steps=20, negative=negative)
    model = attach(tiny_models("sd3"), EXACT)
    result = sample(model, "sd3", steps=20, negative=negative)
    estimated = [r["ordinal"] for r in last_report(model)["evaluations"] if "estimated" in r["actions"].values()]
    assert estimated and max(estimated) < 11
    assert relative(result, full) < 0.2


def test_sampling_in_two_parts_skips_in_both(tiny_models):
    model = attach(tiny_models("sd3"), EXACT)
    half = sample(model, "sd3", steps=20, start_step=0, last_step=10, force_full_denoise=False)
    assert estimates(model) == 3
    sample(model, "sd3", steps=20, start_step=10, last_step=20, latent=half, disable_noise=True)
    assert estimates(model) == 3 and actions(model, "uncond")[-1] == "computed"


class OtherNames(comfy.samplers.CFGGuider):
    """A guider that calls its conditionings something else, as those of other packs may."""

    def set_conds(self, positive, negative):
        self.inner_set_conds({"main": positive, "against": negative})

    def predict_noise(self, x, timestep, model_options, seed=None):
        conds = [self.conds["main"], self.conds["against"]]
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return uncond + (cond - uncond) * 4.0


class Unexplained(OtherNames):
    """What it makes is nothing like its branches."""

    def predict_noise(self, x, timestep, model_options, seed=None):
        return super().predict_noise(x, timestep, model_options, seed).roll(3, -1)


class ListOfCfgs(comfy.samplers.CFGGuider):
    """A guider with a cfg for each of a list of steps, as those of other packs have."""

    def predict_noise(self, x, timestep, model_options, seed=None):
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], self.conds["positive"], self.cfg[0], model_options
        )


def sample_guider(guider, name="sd15", steps=8, sampler="euler"):
    """Sample with a guider of two plain prompts."""
    guider.set_conds(conditioning(name, 1), conditioning(name, 2))
    noise = torch.randn((1, *SPECS[name]["lat"]), generator=torch.Generator().manual_seed(3))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)


@pytest.mark.parametrize("settings", [reuse_only(), all_methods(2), cfg_cache()], ids=["features", "all", "cfg"])
def test_the_positive_conditioning_is_found_by_its_share_in_what_the_guider_makes(tiny_models, settings):
    model = attach(tiny_models("sd15"), settings)
    ours, theirs = sample_guider(OtherNames(model)), sample_guider(OtherNames(tiny_models("sd15")))
    assert 0 < relative(ours, theirs) < 0.05
    assert set(evaluations(model)) != {"computed"} and messages.NO_REFERENCE not in notes(model)


@pytest.mark.parametrize("settings", [reuse_only(), all_methods(2), cfg_cache()], ids=["features", "all", "cfg"])
def test_where_the_positive_conditioning_is_not_found_nothing_is_reused_either_and_that_is_all_that_is_said(
    tiny_models, settings
):
    model = attach(tiny_models("sd15"), settings)
    ours, theirs = sample_guider(Unexplained(model)), sample_guider(Unexplained(tiny_models("sd15")))
    assert torch.equal(ours, theirs)
    assert evaluations(model) == {"computed": 8} and totals(model)["rows"] == totals(model)["rows_full"] == 16
    assert notes(model) == [messages.NO_REFERENCE]


@pytest.mark.parametrize("cfg", [[4.0] * 8, torch.full((8,), 4.0)], ids=["list", "tensor"])
@pytest.mark.parametrize("settings", [EXACT, PRESETS["balanced"](Window())], ids=["exact", "balanced"])
def test_a_guider_whose_cfg_is_no_number_samples(tiny_models, settings, cfg):
    model = attach(tiny_models("sd15"), settings)
    guiders = [ListOfCfgs(model), ListOfCfgs(tiny_models("sd15"))]
    for guider in guiders:
        guider.set_cfg(cfg)
    ours, theirs = map(sample_guider, guiders)
    assert 0 <= relative(ours, theirs) < 0.05
    assert settings is not EXACT or estimates(model) > 0
    json.dumps(last_report(model))


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet without a network, that notes at which sigma and for how many rows it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.asked.append((round(float(t[0]), 5), len(x_noisy)))
        return {"middle": [torch.full((len(x_noisy), 64, 4, 4), 5.0)]}


def controlled(control, seed):
    [[tensor, fields]] = conditioning("sd15", seed)
    return [[tensor, {**fields, "control": control, "control_apply_to_uncond": False}]]


@pytest.mark.parametrize("target, skips", [(42.0, True), (200.0, False)])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
def test_a_controlnet_runs_no_more_often_for_a_probe(tiny_models, monkeypatch, batched, target, skips):
    """An evaluation with a probe runs the network twice, on the same latent. Where nothing is skipped beside, the
    picture is the host's own to the bit."""
    if not batched:
        monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    monkeypatch.setattr(Probe, "due", lambda self, evaluation: evaluation.ordinal in (5, 9))
    options = dict(sampler="heun", steps=8, latent=torch.zeros(1, 4, 8, 8))

    def run(model):
        control = Residuals()
        conds = dict(positive=controlled(control, 1), negative=controlled(control, 2))
        return sample(model, "sd15", **options, **conds), control.asked

    theirs, asked = run(tiny_models("sd15"))
    assert relative(theirs, sample(tiny_models("sd15"), "sd15", **options)) > 1e-4, "the residuals act"
    model = attach(tiny_models("sd15"), adaptive_with_features(target))
    ours, ours_asked = run(model)
    assert sum(record["probe_rows"] > 0 for record in last_report(model)["evaluations"]) >= 2
    assert sum(rows for _, rows in ours_asked) == sum(rows for _, rows in asked) - skipped_rows(model)
    assert (skipped_rows(model) > 0, ours_asked == asked, torch.equal(ours, theirs)) == (skips, not skips, not skips)


def test_a_controlnet_runs_once_an_evaluation_in_calibration_with_features(tiny_models):
    control = Residuals()
    conds = controlled(control, 1), controlled(control, 2)
    latent = torch.zeros(1, 4, 8, 8)
    told = calibrate.Sampling(*conds, latent, 1, 8, 4.0, "euler", "simple")
    reference, _ = calibrate.recorded(tiny_models("sd15"), told, features=True)
    assert len(reference.reused) > 8
    assert sum(rows for _, rows in control.asked) == 2 * 8


def skipped_rows(model):
    """Rows of full sampling that a ControlNet need not see: those of branches that did not run."""
    done = [action for record in last_report(model)["evaluations"] for action in record["actions"].values()]
    return done.count("estimated") + done.count("predicted")


ROWS = {
    "probes": ("sd15", adaptive_with_features(), dict(sampler="heun"), None),
    "probes one by one": ("sd15", adaptive_with_features(), dict(sampler="heun"), "one by one"),
    "CFG-Cache beside PAG": ("sd15", cfg_cache(), {}, lambda m: PerturbedAttentionGuidance.execute(m, 3.0).result[0]),
    "all": ("sd3", all_methods(2), {}, None),
    "FRDiff": (
        "sd15",
        CacheSettings(
            "FRDiff",
            MixSettings(tau=0.0),
            DifferenceSettings("hold"),
            OutputSettings("hold"),
            ReuseSettings({"branch": Interval(10**6)}, "hold"),
        ),
        {},
        None,
    ),
}


@contextmanager
def counted_rows(model):
    """The rows that enter the network of a MODEL while this is open, a list."""
    rows = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    try:
        yield rows
    finally:
        hook.remove()


@pytest.mark.parametrize("name", list(ROWS))
def test_the_report_counts_every_row_that_entered_the_network(tiny_models, monkeypatch, name):
    family, settings, options, extra = ROWS[name]
    if extra == "one by one":
        monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    model = attach(tiny_models(family), settings)
    model = extra(model) if callable(extra) else model
    with counted_rows(model) as rows:
        sample(model, family, steps=8, latent=torch.zeros(2, SPECS[family]["lat"][0], 8, 8), **options)
    records = last_report(model)["evaluations"]
    assert totals(model)["rows"] == sum(record["rows"] for record in records) == sum(rows)
    assert totals(model)["probe_rows"] == sum(record["probe_rows"] for record in records)
    assert (totals(model)["probe_rows"] > 0) == name.startswith("probes")
    full = attach(tiny_models(family), CacheSettings("none"))
    full = extra(full) if callable(extra) else full
    sample(full, family, steps=8, latent=torch.zeros(2, SPECS[family]["lat"][0], 8, 8), **options)
    assert totals(model)["rows_full"] == totals(full)["rows"], "full sampling has no probes"
    assert totals(model)["cost"] == pytest.approx(sum(rows) / totals(full)["rows"])


@dataclass(frozen=True)
class Renamed:
    """The adaptive controller under settings of another class: nothing may depend on which class it is."""

    own: AdaptiveSettings = AdaptiveSettings()
    corrects, probes, longest_reuse = True, True, 3
    reference_only, holds_slope, uses_errors, weighs = False, False, True, False

    def served(self, solver, sampler):
        own, note = self.own.served(solver, sampler)
        return Renamed(own), note

    def controller(self, context):
        return self.own.controller(context)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_a_new_controller_needs_no_change_elsewhere(tiny_models, sampler):
    def run(controller):
        settings = CacheSettings("any", controller, DifferenceSettings(), OutputSettings(), planned_reuse())
        model = attach(tiny_models("sd15"), settings)
        return sample(model, "sd15", sampler=sampler, steps=12), actions(model)

    (theirs, told), (ours, ours_told) = run(AdaptiveSettings()), run(Renamed())
    assert torch.equal(ours, theirs) and ours_told == told and any(told)


def test_a_network_call_before_the_first_evaluation_is_let_through(tiny_models):
    model = attach(tiny_models("sd15"), adaptive_with_features())
    early = []

    def sampler_function(denoise, x, sigmas, **_):
        inner = denoise.inner_model.inner_model
        context = conditioning("sd15", 1)[0][0]
        options = denoise.inner_model.model_options["transformer_options"]
        early.append(inner.apply_model(x, sigmas[:1], c_crossattn=context, transformer_options=options))
        return denoise(x, sigmas[:1].expand(len(x)), **_.get("extra_args", {}))

    sampled = comfy.samplers.KSAMPLER(sampler_function)
    latent = torch.zeros(1, 4, 8, 8)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning("sd15", 1), conditioning("sd15", 2))
    guider.set_cfg(4.0)
    result = guider.sample(torch.randn(1, 4, 8, 8), latent, sampled, torch.tensor([5.0, 0.0]), seed=1)
    assert early and early[0].isfinite().all() and result.isfinite().all()
