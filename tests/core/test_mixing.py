"""Score mixing follows the released FRDiff code, on its own grid and on others."""
import pytest
import torch

from fastercache_core.clock import Clock, Window
from fastercache_core.mixing import MixSchedule, MixSettings, done, flow_timestep, mix, mix_share

STEPS = 50
DDIM = [1000.0 * (1 - i / STEPS) for i in range(STEPS)]  # evenly spaced timesteps, used as sigmas


def schedule(settings=MixSettings(), timestep=lambda sigma: sigma):
    return MixSchedule(settings, lambda percent: 1000.0 * (1 - percent), timestep)


def walk(mixing, sigmas=DDIM):
    """Per evaluation: None for a keyframe, else lambda."""
    clock = Clock([*sigmas, 0.0])
    return [None if mixing.is_keyframe(e) else mixing.share(e) for e in map(clock.tick, sigmas)]


def test_fifty_steps_of_ddim_take_25_keyframes_11_jumps_and_14_evaluations_with_reuse():
    shares = walk(schedule())
    assert shares.count(None) == 25 and shares.count(0.0) == 11
    assert [shares[i] for i in (21, 23, 25, 27, 29, 49)] == pytest.approx([0.0, 0.2, 0.5, 0.8, 1.0, 1.0])


def test_lambda_is_zero_early_one_late_and_a_half_at_the_bias():
    assert mix_share(0.43) == 0.0 and mix_share(0.57) == 1.0 and mix_share(0.5) == 0.5
    assert mix_share(0.7, bias=0.7) == 0.5
    assert mix_share(0.55, tau=1000) == 1.0, "a steep slope is a switch"


def test_on_ddims_grid_the_part_done_is_the_step_number_over_the_steps():
    assert [done(t, lambda sigma: sigma) for t in DDIM] == pytest.approx([i / STEPS for i in range(STEPS)])


@pytest.mark.parametrize("flow_sigma, share", [(0.670, 0.0), (0.618, 0.5), (0.565, 1.0)])
def test_flow_models_mix_where_stable_diffusion_has_the_same_signal_to_noise_ratio(flow_sigma, share):
    assert mix_share(done(flow_sigma, flow_timestep)) == pytest.approx(share, abs=0.02)


def test_flow_models_at_their_ends():
    assert done(1.0, flow_timestep) == 0.0 and done(1e-4, flow_timestep) > 0.99


def test_every_mth_evaluation_is_a_keyframe_whatever_the_sigmas():
    heun = [s for s in DDIM[:10] for _ in range(2)]
    assert [i for i, share in enumerate(walk(schedule(MixSettings(every=3)), heun)) if share is None] == [
        0, 3, 6, 9, 12, 15, 18]


def test_outside_its_window_everything_is_computed():
    shares = walk(schedule(MixSettings(window=Window(0.2, 0.6))))
    assert set(shares[:10]) == {None} and set(shares[31:]) == {None} and 0.0 in shares[10:31]


def test_mixing_is_a_weighted_mean_and_leaves_its_inputs_alone():
    reused, held = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.equal(mix(reused, held, 0.25), torch.full((2, 3), 0.25))
    assert torch.equal(mix(reused, held, 1.0), reused) and torch.equal(mix(reused, held, 0.0), held)
    assert reused.min() == 1 and held.max() == 0
