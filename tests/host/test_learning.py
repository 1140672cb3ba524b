"""Learning on the user's own model: one full sampling beside a cached one, kept in a file for that model."""

import json
from dataclasses import replace
from pathlib import Path

import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.metrics import latent_psnr
from fastercache_pack.fastercache_core.report import full_text
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host import learning
from fastercache_pack.nodes.host.fingerprint import model_fingerprint
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.runs import actions, notes
from testbed.beds import BEDS

BED, FAST = BEDS["mmdit"], PRESETS["fast"](Window())
STEPS, KIND = 16, "euler, 13 to 24 steps"
LEARNS = replace(FAST, learn=True)


@pytest.fixture(scope="module")
def bed():
    return BED.load()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("output", "input"):
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    return tmp_path


def run(model, settings=None, steps=STEPS, sampler="euler", pictures=1, **options):
    """The latent, and the model with its report."""
    patched = attach(model, settings) if settings else model
    latent = BED.empty(pictures)
    noise = comfy.sample.prepare_noise(latent, 5)
    prompts = [BED.conditioning(BED.prompts("tuning")[:pictures]), BED.conditioning([""])]
    where = (steps, 4.5, sampler, BED.scheduler, *prompts, latent)
    return comfy.sample.sample(patched, noise, *where, seed=5, disable_pbar=True, **options), patched


def file_of(model, folders, where="output"):
    return Path(folders, where, "fastercache", "learnt", f"{model_fingerprint(model)}.json")


def constants(path):
    return json.loads(path.read_text())["constants"]


def calibrated(model):
    return [note for note in notes(model) if note.startswith("calibrated")]


def test_the_picture_is_the_cached_one_and_its_distance_to_full_sampling_is_told(bed, folders):
    (cached, before), full = run(bed, FAST, pictures=2), run(bed, pictures=2)[0]
    latent, model = run(bed, LEARNS, pictures=2)
    assert torch.equal(latent, cached) and not torch.equal(latent, full)
    measured = latent_psnr(cached, full)
    assert last_report(model)["run"]["psnr"] == pytest.approx(measured.tolist(), abs=0.01)
    assert f"measured: {measured.mean():.1f} dB PSNR" in full_text(last_report(model))
    assert actions(model) == actions(before)


def test_what_is_learnt_serves_the_next_run_of_this_kind_and_the_report_says_so(bed, folders):
    _, before = run(bed, FAST)
    assert calibrated(before) == [] and not file_of(bed, folders).exists()
    _, learning_run = run(bed, LEARNS)
    [said] = [note for note in notes(learning_run) if "to learn" in note]
    assert f"calibrated on this model, {KIND}, 1 picture: " in said and said.endswith("a model not seen before")
    _, after = run(bed, FAST)
    [now] = calibrated(after)
    assert now in said and last_report(after)["run"]["calibration"] == now
    assert calibrated(run(bed, FAST, steps=10)[1]) == calibrated(run(bed, FAST, sampler="dpmpp_2m")[1]) == []
    assert calibrated(run(bed, PRESETS["paper"](Window()))[1]) == [], "a fixed interval uses no estimate"


def test_a_model_that_is_closer_than_expected_is_skipped_more_and_one_that_is_farther_less(bed, folders):
    path, computed = file_of(bed, folders), {}
    for name, value in (("closer", 60.0), ("as expected", None), ("farther", 0.0)):
        known = learning.Learnt(model_fingerprint(bed)).adding(KIND, [value] * 20 if value is not None else [])
        learning.write_whole(str(path), learning.dumps(known))
        computed[name] = actions(run(bed, FAST)[1]).count("computed")
    assert computed["closer"] < computed["as expected"] < computed["farther"]


def test_pictures_add_up_in_one_file_for_the_model(bed, folders):
    for pictures, steps in ((2, STEPS), (1, STEPS), (1, 30)):
        run(bed, LEARNS, steps, pictures=pictures)
    found = constants(file_of(bed, folders))
    assert {name: len(values) for name, values in found.items()} == {KIND: 3, "euler, 25 and more steps": 1}
    assert len(list(file_of(bed, folders).parent.iterdir())) == 1, "nothing else is left behind"
    assert "3 pictures" in calibrated(run(bed, FAST)[1])[0]


def test_a_file_from_somebody_else_serves_from_the_input_folder(bed, folders):
    run(bed, LEARNS)
    given = file_of(bed, folders, "input")
    given.parent.mkdir(parents=True)
    file_of(bed, folders).rename(given)
    assert calibrated(run(bed, FAST)[1])
    run(bed, LEARNS)
    assert len(constants(file_of(bed, folders))[KIND]) == 2, "own pictures are added to those that were given"


@pytest.mark.parametrize("text", ["{", '{"format": "fastercache learnt", "version": 9}'])
def test_a_file_that_cannot_be_used_counts_as_none_and_is_left_alone(bed, folders, text):
    _, without = run(bed, FAST)
    path = file_of(bed, folders)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    _, model = run(bed, FAST)
    assert actions(model) == actions(without)
    assert [path.name in note for note in notes(model)] == [True]
    assert path.name in last_report(model)["run"]["calibration"], "it stands on the node, too"
    _, model = run(bed, LEARNS)
    assert path.read_text() == text and any(
        note.startswith("what this run showed was not kept") for note in notes(model)
    )


def test_a_folder_that_cannot_be_written_costs_no_picture(bed, folders):
    (folders / "output").write_text("a file in place of the folder")
    latent, model = run(bed, LEARNS)
    assert latent.isfinite().all() and any("was not kept" in note for note in notes(model))


def masked(shape):
    mask = torch.zeros(shape)
    mask[..., : shape[-1] // 2] = 1
    return mask


@pytest.mark.parametrize("options", [{"steps": 4}, {"noise_mask": masked((1, 1, 16, 16))}], ids=["few steps", "mask"])
def test_where_nothing_can_be_learnt_nothing_is_sampled_in_full(bed, folders, options):
    calls = []
    count = lambda call, arguments: calls.append(1) or call(arguments["input"], arguments["timestep"], **arguments["c"])
    counted = bed.clone()
    counted.set_model_unet_function_wrapper(count)
    _, model = run(counted, LEARNS, **options)
    assert messages.NOTHING_LEARNT in notes(model) and not file_of(bed, folders).exists()
    assert len(calls) <= options.get("steps", STEPS)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_full_sampling_has_the_noise_of_the_cached_run(bed, folders, sampler):
    """With other noise the two would be as far apart as two pictures are."""
    _, model = run(bed, replace(PRESETS["exact-looking"](Window()), learn=True), 40, sampler)
    assert messages.NOTHING_LEARNT in notes(model) or min(last_report(model)["run"]["psnr"]) > 30


def test_after_learning_the_model_is_as_before(bed, folders):
    full = run(bed)[0]
    run(bed, LEARNS)
    assert torch.equal(run(bed)[0], full)
