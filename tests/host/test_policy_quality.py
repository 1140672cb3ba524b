"""A policy found on some prompts serves others: on the trained model it must be far better than fewer steps."""
import comfy.sample
import pytest
from fastercache_pack.fastercache_core.guidance import GuidanceSettings
from fastercache_pack.fastercache_core.jump import JumpSettings
from fastercache_pack.fastercache_core.metrics import psnr
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.attach import attach, last_report
from fastercache_pack.nodes.host.calibrate import Sampling, find_policy
from testbed.beds import BEDS

BED, PICTURES, STEPS, BUDGET = BEDS["mmdit"], 6, 30, 0.5


@pytest.fixture(scope="module")
def model():
    return BED.load()


def pictures(model, prompts, steps=STEPS):
    latent = BED.empty(len(prompts))
    samples = comfy.sample.sample(model, comfy.sample.prepare_noise(latent, 5), steps, BED.cfg, "euler", BED.scheduler,
                                  BED.conditioning(prompts), BED.conditioning([""]), latent, seed=5, disable_pbar=True)
    return BED.decode(model, samples)


def test_half_the_cost_by_policy_is_far_closer_than_half_the_steps(model):
    known, others = BED.prompts("tuning")[:PICTURES], BED.prompts("report")[:PICTURES]
    told = Sampling(BED.conditioning(known), BED.conditioning([""]), BED.empty(PICTURES), 3, STEPS, BED.cfg, "euler",
                    BED.scheduler)
    policy = find_policy(model, told, BUDGET)
    cached = attach(model, CacheSettings("policy", GuidanceSettings(), jump=JumpSettings(), plan=policy))
    full = pictures(model, others)
    ours = psnr(pictures(cached, others), full).mean()
    assert last_report(cached)["totals"]["cost"] <= BUDGET
    assert ours > psnr(pictures(model, others, int(STEPS * BUDGET)), full).mean() + 6
