"""Nodes that sample one or two steps at a time, or from less noise to more: one report, one line, the true reason."""

import logging

import comfy.sample
import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support import tiny
from support.guidance import with_steps
from support.runs import notes, totals

BALANCED = PRESETS["balanced"](Window())
SIGMAS = torch.linspace(1.0, 0.0, 21)


def sampled(model, sigmas, latent=None, noise=True):
    latent = torch.zeros(1, 16, 8, 8) if latent is None else latent
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3)) if noise else torch.zeros_like(latent)
    both = tiny.conditioning("sd3", 1), tiny.conditioning("sd3", 2)
    sampler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(model, start, 4.0, sampler, sigmas, *both, latent, disable_pbar=True, seed=3)


def step_by_step(model, size, twice=False):
    latent = None
    for i in range(0, len(SIGMAS) - 1, size):
        for _ in range(1 + twice):
            latent = sampled(model, SIGMAS[i : i + size + 1], latent, noise=i == 0)


def lines(caplog):
    return [record.message for record in caplog.records if record.message.startswith("FasterCache [")]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "for two regions"])
def test_runs_of_one_or_two_steps_in_a_row_make_one_report_and_one_line(tiny_models, caplog, size, twice):
    model = attach(tiny_models("sd3"), BALANCED)
    with caplog.at_level(logging.INFO):
        step_by_step(model, size, twice)
    report, count = last_report(model), 20 * (1 + twice)
    assert len(lines(caplog)) == 1
    assert [record["ordinal"] for record in report["evaluations"]] == list(range(count))
    assert totals(model)["rows"] == totals(model)["rows_full"] == 2 * count
    assert report["run"]["steps"] == count and report["run"]["runs"] == count // size
    assert notes(model) == [messages.STEP_BY_STEP]


def test_the_next_picture_has_a_report_of_its_own(tiny_models, caplog):
    model = attach(tiny_models("sd3"), BALANCED)
    with caplog.at_level(logging.INFO):
        step_by_step(model, 1)
        step_by_step(model, 1)
        sampled(model, SIGMAS)
    assert len(lines(caplog)) == 3
    assert len(last_report(model)["evaluations"]) == 20 and "runs" not in last_report(model)["run"]


def test_a_distilled_model_of_two_steps_has_a_report_and_a_line_for_each_picture(tiny_models, caplog):
    model = attach(tiny_models("sd3"), BALANCED)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            sampled(model, torch.tensor([1.0, 0.5, 0.0]))
    assert len(lines(caplog)) == 3 and len(last_report(model)["evaluations"]) == 2


def test_a_line_that_was_held_back_comes_before_the_next_run(tiny_models, caplog):
    """The first steps by one node, the others by another."""
    model = attach(tiny_models("sd3"), BALANCED)
    with caplog.at_level(logging.INFO):
        sampled(model, SIGMAS[2:], sampled(model, SIGMAS[:3]), noise=False)
    assert len(lines(caplog)) == 2 and len(last_report(model)["evaluations"]) == 18


@pytest.mark.parametrize(
    "sigmas, note",
    [
        (SIGMAS, messages.TOO_MUCH_CHANGE),
        (SIGMAS[::2], messages.TOO_FEW_STEPS),
        (torch.linspace(0.05, 1.0, 31), messages.NOISE_RISES),
    ],
    ids=["20 steps", "10 steps", "unsampling"],
)
def test_few_steps_are_named_only_where_there_are_few(tiny_models, sigmas, note):
    model = attach(tiny_models("flux"), PRESETS["exact-looking"](Window()))
    both = tiny.conditioning("flux", 1), tiny.conditioning("flux", 2)
    noise, latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(1, 16, 8, 8)
    sampler = comfy.samplers.sampler_object("euler")
    comfy.sample.sample_custom(model, noise, 4.0, sampler, sigmas, *both, latent, disable_pbar=True, seed=3)
    assert note in notes(model)
    assert note == messages.TOO_FEW_STEPS or not any("few steps" in said for said in notes(model))


def test_a_run_without_evaluations_tells_nothing(tiny_models, caplog):
    model = attach(tiny_models("sd3"), with_steps())
    sampled(model, SIGMAS)
    before = last_report(model)
    with caplog.at_level(logging.INFO):
        sampled(model, torch.tensor([0.5]))
    assert lines(caplog) == [] and last_report(model) == before
