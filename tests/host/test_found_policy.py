"""A policy that Auto-FR found is used by itself, for exactly the runs that it was found for."""

from dataclasses import replace

import folder_paths
import pytest
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.nodes.fastercache import PRESETS, automatic, takes_found
from fastercache_pack.nodes.host.calibrate import Sampling, find_policy
from fastercache_pack.nodes.host.found import keep
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.trained import Painter

STEPS, CFG = 8, 1.0


@pytest.fixture(scope="module")
def painter():
    return Painter("mmdit")


@pytest.fixture(scope="module")
def policy(painter):
    bed, prompts = painter.bed, painter.prompts[:2]
    conditions = bed.conditioning(prompts), bed.conditioning([""])
    sampling = Sampling(*conditions, bed.empty(2), 3, STEPS, CFG, "euler", bed.scheduler)
    return find_policy(painter.model, sampling, 0.75)


@pytest.fixture
def kept(policy, tmp_path, monkeypatch):
    """The file of the policy."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return keep(policy)


def notes(painter, steps=STEPS, cfg=CFG, sampler="euler", closeness=42.0, found=True):
    """What is said after a run of an automatic preset."""
    model = attach(painter.model, replace(automatic("test", closeness, Window()), found=found))
    painter.paint(model, steps=steps, cfg=cfg, sampler=sampler)
    return " ".join(last_report(model)["notes"])


def test_it_is_used_for_exactly_its_run_and_the_report_says_so(painter, policy, kept):
    actions = policy.points[policy.chosen].actions()
    assert "uses the policy that FasterCache Auto-FR found for this model, sampler and steps on 20" in notes(painter)
    assert actions in notes(painter) and actions.count("C") == 6


@pytest.mark.parametrize("other", [{"steps": 7}, {"cfg": 2.0}, {"sampler": "res_multistep"}])
def test_another_run_decides_for_itself(painter, kept, other):
    assert "uses the policy" not in notes(painter, **other)


def test_it_can_be_switched_off(painter, kept):
    assert "uses the policy" not in notes(painter, found=False)


def test_presets_that_promise_more_than_a_policy_do_not_take_it():
    taking = [name for name, preset in PRESETS.items() if takes_found(preset(Window()))]
    assert taking == ["balanced", "fast"]


def test_a_damaged_file_is_told_and_left_alone(painter, kept):
    with open(kept, "w", encoding="utf-8") as file:
        file.write("{")
    assert messages.found_unreadable("The policy is not readable JSON")[:60] in notes(painter)


def test_with_few_steps_and_without_one_the_node_says_what_a_policy_costs(painter, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    would_help = messages.policy_would_help(7)
    assert would_help in notes(painter, closeness=48.0)
    assert would_help not in notes(painter, steps=20)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "lcm"])
def test_where_a_policy_may_predict_nothing_none_is_offered(painter, tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    assert messages.policy_would_help(7) not in notes(painter, closeness=48.0, sampler=sampler)
