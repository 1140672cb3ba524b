"""The benchmark of what people run: its settings, the controls of a picture, and the number that it ends with."""

import json
import math
import random
from collections import Counter
from dataclasses import asdict, replace

import comfy.sample
import comfy.samplers
import pytest
import torch

from benchmarks import usage
from benchmarks.tools.frontier import at_steps, psnr_of
from benchmarks.tools.jobs import Job, Painted, Painter, Patch
from benchmarks.tools.usage_settings import SETTINGS, Setting, beds_of, resampled
from benchmarks.usage import THRESHOLDS, Picture, Record, nearest, parse, show, table, work_left
from testbed.beds import BEDS

EIGHT = Setting("eight", 7, "euler", 8, 1.0, ("mmdit",))
LISTS = next(setting for setting in SETTINGS if setting.lists)
RECORD = Record("a", 1, "mmdit", "fast", "p", 0, 0.5, 40.0, 35.0, True, "ccpc", 36.0, 18.0)


def error(steps: int) -> float:
    """Of fewer steps on the fake painter: a straight line in 1 / steps, zero at eight."""
    return 0.8 * (1 / steps - 1 / 8)


class Fake:
    """Paints grey; how far off and how dear is set for each preset, and follows from steps and thresholds."""

    name = "fake"

    def __init__(self, presets: dict[str, tuple[float, float]]) -> None:
        self.presets, self.painted = presets, []

    def paint(self, job, patch=None, steps=None):
        self.painted.append((job.seed, patch and patch.kind, steps))
        off, cost = error(steps or 8), (steps or 8) / 8
        if patch:
            off, cost = self.presets.get(patch.value) or (patch.value / 100, 1 / (1 + patch.value))
        off += 0.3 if job.seed >= usage.OTHER_SEED else 0.0
        return Painted(torch.full((1, 3, 4, 4), 0.1 + off), round(800 * cost), "")


def test_weights_are_percent_and_the_groups_are_those_that_were_counted():
    assert sum(setting.weight for setting in SETTINGS) == 100
    shares = Counter()
    for setting in SETTINGS:
        shares[setting.sampler, bool(setting.lists), setting.steps, setting.cfg > 1] += setting.weight
    assert shares["res_multistep", False, 20, False] == 17 and shares["res_multistep", False, 8, False] == 9
    assert shares["euler", False, 20, False] + shares["euler", False, 25, False] == 11
    assert shares["euler", False, 20, True] == 12 and shares["euler", False, 8, False] == 7
    assert shares["euler", True, 11, False] == 20 and shares["euler_ancestral", True, 11, False] == 6


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_settings_are_the_hosts_and_have_a_bed(setting):
    assert setting.sampler in comfy.samplers.SAMPLER_NAMES
    assert beds_of(setting) and set(beds_of(setting)) <= set(BEDS)
    assert [other.name for other in SETTINGS].count(setting.name) == 1
    if setting.lists:
        assert setting.steps == sum(len(sigmas) - 1 for sigmas in setting.lists)
        assert all(list(sigmas) == sorted(sigmas, reverse=True) and sigmas[-1] == 0 for sigmas in setting.lists)


def test_beds_that_exist_are_used_and_others_in_place_of_those_that_do_not():
    setting = replace(EIGHT, beds=("missing|also missing", "missing|mmdit|wan", "emoji_unet|wan", "?net"))
    assert beds_of(setting) == ["mmdit", "unet"]
    assert beds_of(setting, ["wan", "unet"]) == ["wan", "unet"] and beds_of(EIGHT, ["wan"]) == []


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 11])
def test_lists_keep_their_ends_and_share_fewer_steps(steps):
    first, second = LISTS.plan(steps, None)
    assert len(first) + len(second) - 2 == steps and min(len(first), len(second)) >= 2
    assert (first[0], first[-1], second[0], second[-1]) == (1.0, 0.0, 0.909375, 0.0)
    if steps == LISTS.steps:
        assert (tuple(first), tuple(second)) == LISTS.lists


def test_a_list_is_resampled_between_its_neighbours():
    assert resampled([1.0, 0.8, 0.2, 0.0], 2) == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_experts_go_on_where_the_last_one_stopped(steps):
    high, low = replace(EIGHT, experts=2).plan(steps, lambda n: [1 - i / n for i in range(n + 1)])
    assert high[-1] == low[0] and len(high) + len(low) - 2 == steps and abs(len(high) - len(low)) <= 1


def test_errors_between_two_step_counts_are_on_a_line_in_one_over_n():
    asked = []
    assert at_steps(lambda n: asked.append(n) or 3 / n + 1, 6.4) == pytest.approx(3 / 6.4 + 1)
    assert at_steps(lambda n: asked.append(n) or 3 / n + 1, 5.0) == pytest.approx(1.6) and asked == [6, 7, 5]


def test_a_picture_is_compared_at_equal_cost_and_its_controls_are_sampled_once():
    painter = Fake({"fast": (0.02, 0.7), "balanced": (0.01, 0.8)})
    picture = Picture(painter, Job(EIGHT, "p", 20))
    fast, balanced = (picture.record(name, target, False) for name, target in (("fast", 30.0), ("balanced", 50.0)))
    assert (fast.cost, fast.psnr) == (0.7, pytest.approx(-20 * math.log10(0.02), abs=1e-3))
    assert fast.fewer == pytest.approx(-20 * math.log10(0.8 * (1 / 5.6 - 1 / 8)), abs=1e-3)
    assert fast.gain == pytest.approx(fast.psnr - fast.fewer) and (fast.met, balanced.met) == (True, False)
    assert fast.other_seed == pytest.approx(-20 * math.log10(0.3), abs=1e-3)
    plain = [steps for seed, kind, steps in painter.painted if steps]
    assert sorted(plain) == [5, 6, 7] and painter.painted.count((20, None, None)) == 1


def test_a_picture_in_which_nothing_was_skipped_met_its_target_and_has_no_gain():
    record = Picture(Fake({"fast": (0.0, 1.0)}), Job(EIGHT, "p", 20)).record("fast", 36.0, True)
    assert (record.psnr, record.fewer, record.gain, record.met, record.EasyCache) == (None, None, None, True, None)


@pytest.mark.parametrize("cost", [0.3, 0.62, 0.9, 0.999])
def test_the_threshold_whose_cost_is_nearest_is_found_with_few_runs(cost):
    asked = []
    found = nearest(lambda t: asked.append(t) or (1 / (1 + t), t), cost)
    assert abs(found[0] - cost) == min(abs(1 / (1 + t) - cost) for t in THRESHOLDS) and len(set(asked)) <= 6


def test_caches_of_the_host_stand_at_a_cost_near_ours():
    record = Picture(Fake({"fast": (0.02, 0.7)}), Job(EIGHT, "p", 20)).record("fast", 36.0, True)
    cost, psnr = record.LazyCache
    assert record.LazyCache == record.EasyCache and abs(cost - 0.7) < 0.1
    assert psnr == pytest.approx(psnr_of((1 / cost - 1) / 100), abs=0.2)


def test_work_left_is_weighted_by_usage_over_settings_whose_beds_count_alike():
    random.seed(3)
    weights, records, total = {"a": 17, "b": 3, "c": 11}, [], 0.0
    for (name, weight), beds in zip(weights.items(), (1, 2, 3)):
        means = []
        for bed in range(beds):
            costs = [random.random() for _ in range(bed + 1)]  # beds of unequal numbers of pictures
            means.append(sum(costs) / len(costs))
            records += [replace(RECORD, setting=name, weight=weight, bed=str(bed), cost=cost) for cost in costs]
        total += weight * sum(means) / beds
    assert work_left(records) == (pytest.approx(total / 31), 31)


def test_the_table_leaves_pictures_without_skips_out_of_all_but_the_cost(capsys):
    untouched = replace(RECORD, cost=1.0, psnr=None, fewer=None, met=True)
    records = [RECORD, replace(RECORD, psnr=44.0), untouched, replace(RECORD, bed="wan", met=False)]
    rows = table(records).splitlines()
    assert rows[2].startswith("| a | 1% | mmdit | 0.67 | 42.0 +- 2.0 | +7.0 +- 2.0 | 2 of 2 | 40.0 |")
    assert "| 0 of 1 |" in rows[3] and "nothing skipped" in table([untouched])
    show([*records, replace(RECORD, preset="balanced", cost=0.8)])
    assert capsys.readouterr().out.endswith("| settings of 1% | 0.583 | 0.800 |\n")


def test_a_cache_of_the_host_is_shown_by_the_pictures_that_it_changed():
    assert usage.host_cell([(0.8, 30.0), (0.9, 40.0), (1.0, None), None]) == "0.85: 35.0"
    assert usage.host_cell([(1.0, None)]) == "does nothing" and usage.host_cell([None]) == ""


def test_records_are_plain_json():
    assert json.loads(json.dumps(asdict(RECORD), allow_nan=False))["actions"] == "ccpc"


def test_the_command_line_asks_for_report_prompts_and_three_presets():
    options = parse([])
    assert (options.prompts, options.presets, len(options.settings)) == ("report", usage.PRESETS[:3], len(SETTINGS))
    assert parse(["--settings", "euler 8", "--no-host-caches"]).host_caches is False


@pytest.fixture(scope="module")
def painter():
    return Painter("mmdit")


def test_two_experts_of_one_model_paint_what_the_hosts_sampler_paints(painter):
    setting, prompt, steps = replace(EIGHT, cfg=3.5, experts=2), "red apple on blue", 6
    latent = painter.bed.empty(1)
    conds = painter.bed.conditioning([prompt]), painter.bed.conditioning([""])
    noise = comfy.sample.prepare_noise(latent, 5)
    inputs = noise, steps, 3.5, "euler", "simple", *conds, latent
    expected = painter.bed.decode(painter.model, comfy.sample.sample(painter.model, *inputs, seed=5, disable_pbar=True))
    found = painter.paint(Job(setting, prompt, 5), steps=steps)
    assert found.rows == 2 * steps and torch.allclose(found.picture, expected, atol=1e-4)


@pytest.mark.parametrize("kind, value", [("FasterCache", "fast"), ("LazyCache", 3.0)])
def test_patches_skip_rows_and_the_pack_says_at_which_evaluations(painter, kind, value):
    painted = painter.paint(Job(replace(EIGHT, steps=20), "red apple on blue", 5), Patch(kind, value))
    assert painted.rows < 20
    if kind == "FasterCache":
        assert len(painted.actions) == 20 and painted.actions.count("c") == painted.rows


def test_actions_of_both_stages_are_told(painter):
    painted = painter.paint(Job(LISTS, "red apple on blue", 5), Patch("FasterCache", "balanced"))
    assert len(painted.actions) == LISTS.steps and painted.rows == painted.actions.count("c")
