"""The quality benchmark's arithmetic, and that it never samples twice what it has finished."""

import json

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality import (
    FULL,
    Batch,
    Cells,
    Method,
    Setting,
    entry,
    frame_error,
    measure,
    named_node,
    parse,
    summarise,
    table,
)
from benchmarks.tools.frontier import area, at_cost, frontier, interval
from benchmarks.tools.sampling import Result
from testbed.beds import BEDS

SETTING = Setting("mmdit", 30, 4.5, "euler")


class Bar:
    """A progress bar that shows nothing."""

    def set_description(self, text):
        pass

    def update(self):
        pass

    def reset(self, total):
        pass


class Bench:
    """Samples grey pictures; `off` is how much lighter than full sampling each method's are."""

    host, bed = None, BEDS["mmdit"]

    def __init__(self, off):
        self.off, self.sampled = off, []

    def count_flops(self, run, prompts, seed):
        return 300 if "features" in run.name else 1000

    def sample(self, run, prompts, seed, on_progress=None):
        self.sampled.append(run.name)
        picture = np.full((len(prompts), 16, 16, 3), 0.5 + self.off.get(run.name, 0.0), np.float32)
        return Result(picture, rows=2 * run.steps * len(prompts), seconds=1.0, report=None)


def test_an_interval_holds_the_true_mean_19_times_in_20():
    samples = np.random.default_rng(0).normal(40.0, 5.0, (4000, 30))
    means, halves = np.array([interval(sample)[:2] for sample in samples]).T
    inside = np.abs(means - 40.0) <= halves
    assert 0.92 < inside.mean() < 0.97


def test_an_interval_tells_the_worst_and_survives_one_picture():
    assert interval([40.0, 50.0, 30.0])[2] == 30.0
    assert interval([40.0]) == (40.0, 0.0, 40.0)


def test_a_frontier_leaves_out_what_costs_more_and_is_worse():
    assert frontier([(0.8, 45), (0.4, 40), (0.6, 50), (0.4, 38)]) == [(0.4, 40), (0.6, 50)]


def test_the_area_between_lines_five_apart_is_five_times_the_shared_cost():
    ours = [(0.3, 35), (0.7, 55)]
    control = [(0.5, 40), (0.9, 60)]
    size, width = area(ours, control)
    assert width == pytest.approx(0.2) and size == pytest.approx(5 * 0.2)
    assert area(control, ours)[0] == pytest.approx(-size)


def test_the_area_follows_bends_of_either_frontier():
    bent = [(0.2, 30), (0.5, 60), (0.8, 61)]
    straight = [(0.2, 30), (0.8, 30.0001)]
    assert area(bent, straight)[0] == pytest.approx(0.3 * 30 / 2 + 0.3 * 30.5, abs=1e-3)


def test_frontiers_that_do_not_overlap_have_no_area():
    assert area([(0.2, 30), (0.3, 40)], [(0.5, 30), (0.6, 40)]) == (0.0, 0.0)


def test_a_frontier_tells_nothing_beyond_its_ends():
    assert at_cost([(0.4, 40), (0.6, 50)], 0.5) == pytest.approx(45)
    assert at_cost([(0.4, 40), (0.6, 50)], 0.7) is None


def test_a_finished_cell_is_not_sampled_again(tmp_path):
    method, bench = Method("fewer steps", "15 steps", steps=15), Bench({"15 steps": 0.1})
    batch = Batch(SETTING, ["a", "b"])
    first = measure(bench, Cells(tmp_path), batch, method, Bar())
    assert bench.sampled == ["full", "15 steps"]
    again = measure(bench, Cells(tmp_path), batch, method, Bar())
    assert bench.sampled == ["full", "15 steps"] and again == first
    assert first["psnr"] == pytest.approx([20.0, 20.0], abs=1e-3)


@pytest.mark.parametrize("changed", [Setting("mmdit", 30, 9.0, "euler"), Setting("mmdit", 30, 4.5, "heun")])
def test_another_setting_is_sampled_anew_with_its_own_reference(tmp_path, changed):
    method, bench = Method("fewer steps", "15 steps", steps=15), Bench({})
    measure(bench, Cells(tmp_path), Batch(SETTING, ["a"]), method, Bar())
    measure(bench, Cells(tmp_path), Batch(changed, ["a"]), method, Bar())
    assert bench.sampled == ["full", "15 steps"] * 2


def test_a_whole_setting_is_sampled_with_nodes_and_their_inputs_and_summarised(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "methods", lambda *_: [Method("adaptive", "45 dB", (("FasterCache", {"a": 1}),))])
    bench = Bench({"45 dB": 0.1})
    results = quality.sample_setting(bench, Cells(tmp_path), SETTING, parse(["--pictures", "11"]), Bar())
    full, ours = summarise(SETTING, results)["runs"]
    assert (full["cost"], ours["name"]) == (1.0, "45 dB") and ours["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert bench.sampled == ["full", "full", "45 dB", "45 dB"]  # eight pictures, then three


def test_pictures_may_be_sampled_one_by_one_and_by_some_methods_only(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "methods", lambda *_: [Method("adaptive", "45 dB"), Method("fewer steps", "9 steps")])
    bench, words = Bench({"45 dB": 0.1}), ["--pictures", "3", "--batch", "1", "--only", "adaptive"]
    results = quality.sample_setting(bench, Cells(tmp_path), SETTING, parse(words), Bar())
    assert [method.name for method in results] == ["full", "45 dB"]
    assert bench.sampled == ["full"] * 3 + ["45 dB"] * 3


def test_operations_are_counted_where_rows_do_not_tell_the_cost(tmp_path, monkeypatch):
    both = [Method("with features", "45 dB, features"), Method("adaptive", "45 dB")]
    monkeypatch.setattr(quality, "methods", lambda *_: both)
    bench = Bench({"45 dB": 0.1, "45 dB, features": 0.1})
    results = quality.sample_setting(bench, Cells(tmp_path), SETTING, parse(["--pictures", "3"]), Bar())
    _, reused, ours = summarise(SETTING, results)["runs"]
    assert (reused["cost"], reused["rows_cost"]) == (0.3, 1.0) and (ours["cost"], ours["flops_cost"]) == (1.0, None)


def test_a_line_cut_short_by_an_interruption_loses_only_itself(tmp_path):
    cells = Cells(tmp_path)
    cells.add("a", {"rows": 1})
    with cells.path.open("a") as file:
        file.write('{"key": "b", "ro')
    again = Cells(tmp_path)
    assert again.get("a") == {"key": "a", "rows": 1} and again.get("b") is None
    again.add("b", {"rows": 2})
    assert {key: cell["rows"] for key, cell in Cells(tmp_path).finished.items()} == {"a": 1, "b": 2}


def test_full_sampling_is_stored_whole_and_made_once(tmp_path):
    made = []

    def make():
        made.append(Result(np.random.default_rng(0).random((2, 4, 4, 3)), 60, 1.5, {"notes": []}))
        return made[0]

    first, again = Cells(tmp_path).result("x", make), Cells(tmp_path).result("x", make)
    assert len(made) == 1 and (first.rows, first.seconds) == (again.rows, again.seconds) == (60, 1.5)
    assert (again.pictures == made[0].pictures).all()


def test_full_sampling_itself_is_sampled_once(tmp_path):
    bench = Bench({})
    for method in (FULL, Method("fewer steps", "15 steps", steps=15)):
        measure(bench, Cells(tmp_path), Batch(SETTING, ["a"]), method, Bar())
    assert bench.sampled == ["full", "15 steps"]


def cell(rows, psnr, **more):
    """A finished cell."""
    return {
        "rows": rows,
        "seconds": 1.0,
        "psnr": psnr,
        "ssim": [0.9] * len(psnr),
        "lpips": None,
        "frames": None,
        "flops": None,
        "notes": [],
        **more,
    }


def test_batches_of_unequal_size_count_by_their_pictures():
    full = [cell(60, [100.0] * 3), cell(20, [100.0])]
    row = entry(Method("adaptive", "45 dB"), [cell(30, [40.0, 40.0, 40.0]), cell(10, [60.0])], full)
    assert row["psnr"] == 45.0 and row["cost"] == 0.5 and row["psnr_worst"] == 40.0


def test_operations_count_only_where_every_run_counted_them():
    full = [cell(60, [100.0], flops=1000)]
    assert entry(Method("preset", "p"), [cell(60, [40.0], flops=700)], full)["flops_cost"] == 0.7
    assert entry(Method("preset", "p"), [cell(60, [40.0])], full)["flops_cost"] is None


def test_gain_and_area_are_taken_at_equal_cost():
    results = {
        FULL: [cell(100, [100.0])],
        Method("fewer steps", "4"): [cell(40, [30.0])],
        Method("fewer steps", "8"): [cell(80, [50.0])],
        Method("adaptive", "a"): [cell(50, [45.0])],
        Method("adaptive", "b"): [cell(70, [55.0])],
    }
    summary = summarise(SETTING, results)
    gains = {run["name"]: run["gain"] for run in summary["runs"]}
    assert gains["a"] == pytest.approx(10.0) and gains["b"] == pytest.approx(10.0) and gains["full"] is None
    assert summary["areas"]["adaptive"]["fewer steps"]["mean"] == pytest.approx(10.0)


def test_a_method_that_skips_nothing_is_said_to_do_nothing_and_is_on_no_frontier():
    results = {
        FULL: [cell(100, [100.0])],
        Method("LazyCache", "l"): [cell(100, [100.0])],
        Method("adaptive", "a"): [cell(50, [45.0])],
    }
    summary = summarise(SETTING, results)
    assert summary["runs"][1]["notes"] == ["does nothing here"] and summary["areas"] == {}


def test_a_clip_that_is_lighter_throughout_has_no_frame_error_but_a_flickering_one_has():
    clip = np.random.default_rng(0).random((2, 3 * 4, 4, 3))
    flicker = clip.copy()
    flicker[:, 4:8] += 0.1  # the middle one of three frames
    assert frame_error(clip + 0.1, clip, 3) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert frame_error(flicker, clip, 3) == pytest.approx([0.1, 0.1])
    assert frame_error(flicker, clip, 1) is None


def test_a_node_is_named_with_numbers_truth_values_and_words():
    assert named_node("LazyCache:reuse_threshold=0.3,verbose=true,mode=fast") == (
        "LazyCache",
        {"reuse_threshold": 0.3, "verbose": True, "mode": "fast"},
    )
    assert named_node("LazyCache") == ("LazyCache", {})


def test_all_widens_only_what_is_not_given():
    assert parse([]).sampler == ("euler",)
    chosen = parse(["--all", "--steps", "20"])
    assert chosen.steps == [20] and chosen.cfg == quality.CFGS and chosen.sampler == quality.SAMPLERS


def test_the_summary_is_plain_json():
    results = {FULL: [cell(100, [100.0])], Method("adaptive", "a"): [cell(50, [45.0])]}
    json.loads(json.dumps(summarise(SETTING, results), allow_nan=False))


def test_the_table_says_how_often_and_how_far_a_target_was_met():
    method = Method("adaptive", "42 dB", target=42.0)
    results = {
        FULL: [cell(100, [100.0])],
        method: [cell(50, [40.0, 43.0, 45.0, 50.0])],
        Method("LazyCache", "l"): [cell(60, [35.0])],
    }
    lines = table(summarise(SETTING, results)).splitlines()
    [met] = [line for line in lines if "met by" in line]
    assert met.endswith("met by 75%, median +2.0 dB")
