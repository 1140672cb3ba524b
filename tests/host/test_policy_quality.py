"""A policy found on some prompts serves others: on the trained model it must be far better than fewer steps."""

import pytest
from fastercache_pack.fastercache_core.features.storage import StorageSettings
from fastercache_pack.nodes.frdiff import policy_settings
from fastercache_pack.nodes.host.calibrate import Sampling, find_policy
from fastercache_pack.nodes.host.wrappers import attach

from support.runs import totals
from support.trained import STEPS, Painter, decibels
from testbed.beds import BEDS

BUDGET = 0.5


def test_half_the_cost_by_policy_is_far_closer_than_half_the_steps():
    known, others = (BEDS["mmdit"].prompts(part)[:6] for part in ("tuning", "report"))
    painter = Painter("mmdit", others, seed=5)
    bed, model = painter.bed, painter.model
    sampling = Sampling(
        bed.conditioning(known), bed.conditioning([""]), bed.empty(6), 3, STEPS, bed.cfg, "euler", bed.scheduler
    )
    cached = attach(model, policy_settings(find_policy(model, sampling, BUDGET), StorageSettings()))
    full, ours, fewer = painter.full(), painter.paint(cached), painter.full(steps=int(STEPS * BUDGET))
    assert 0.4 < totals(cached)["cost"] <= BUDGET
    assert decibels(ours, full) > decibels(fewer, full) + 6


@pytest.mark.parametrize("budget, ahead", [(0.75, 4.0), (0.63, 5.0)])
def test_a_turbo_model_needs_six_or_five_of_its_eight_steps(budget, ahead):
    known, others = (BEDS["mmdit_turbo8"].prompts(part)[:4] for part in ("tuning", "report"))
    painter = Painter("mmdit_turbo8", others, seed=5)
    bed, model, run = painter.bed, painter.model, {"cfg": 1.0, "sampler": "euler"}
    conditions = bed.conditioning(known), bed.conditioning([""])
    sampling = Sampling(*conditions, bed.empty(4), 3, 8, 1.0, "euler", bed.scheduler)
    cached = attach(model, policy_settings(find_policy(model, sampling, budget), StorageSettings()))
    full, ours = painter.full(steps=8, **run), painter.paint(cached, steps=8, **run)
    assert decibels(ours, full) > decibels(painter.full(steps=int(8 * budget), **run), full) + ahead
