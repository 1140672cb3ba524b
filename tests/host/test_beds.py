"""The trained models draw what their prompts say, and a recording holds what the network gave."""

import pytest
import torch
from fastercache_pack.fastercache_core.metrics import psnr

from benchmarks.tools.recording import record
from support.trained import Painter, decibels
from testbed.beds import BEDS
from testbed.train import data

PROMPTS, STEPS = 6, 20
CORNER, MIDDLE = 5, slice(16, 48)


class Painted:
    """Six tuning prompts and, twice, the same ones on gray, sampled in one batch of a bed."""

    def __init__(self, name):
        tuning = BEDS[name].prompts("tuning")[:PROMPTS]
        self.prompts = tuning + 2 * [prompt.partition(" on ")[0] + " on gray" for prompt in tuning]
        painter = Painter(name, self.prompts)
        self.name, self.bed, self.model = name, painter.bed, painter.model
        self.drawn = pictures = painter.full(steps=min(STEPS, self.bed.steps))
        self.clips = pictures if self.bed.frames > 1 else pictures[:, None]  # [18, frames, 3, 64, 64]
        self.pictures = self.clips[:, self.bed.frames // 2]  # [18, 3, 64, 64]

    def colours(self):
        """The words for the upper and the lower background of every sample."""
        words = [prompt.partition(" on ")[2].split(" and ") for prompt in self.prompts]
        return [(w[0], w[-1]) for w in words]

    def pairs(self):
        """Pictures on gray, and as many of the same prompts from other noise."""
        return self.pictures[PROMPTS:].split(PROMPTS)

    def foreground(self):
        """The clips less the backgrounds that their prompts name."""
        upper, lower = (torch.tensor([data.SHADES.index(w) for w in words]) for words in zip(*self.colours()))
        return self.clips - data.backgrounds(upper, lower)[:, None]


@pytest.fixture(scope="module", params=list(BEDS))
def painted(request):
    return Painted(request.param)


def share(hits):
    """The share of true values."""
    hits = list(hits)
    return sum(hits) / len(hits)


def nearest_shade(pixels):
    """The palette's word for the mean colour of pixels [3, ...]."""
    palette = torch.tensor(list(data.COLOURS.values())) / 255
    return data.SHADES[(palette - pixels.flatten(1).mean(1)).square().sum(1).argmin()]


def test_the_background_has_the_colour_that_the_prompt_names(painted):
    if painted.bed.subjects != "emoji":
        pytest.skip("its pictures have no plain background")
    corners = [
        (nearest_shade(p[:, :CORNER, :CORNER]), nearest_shade(p[:, -CORNER:, -CORNER:])) for p in painted.pictures
    ]
    assert share(seen == named for seen, named in zip(corners, painted.colours())) >= 0.75


def test_two_pictures_of_one_prompt_show_the_same_thing(painted):
    first, second = (pictures[..., MIDDLE, MIDDLE] for pictures in painted.pairs())
    likest = (first[:, None] - second[None]).square().mean((2, 3, 4)).argmin(1)
    assert share((likest == torch.arange(PROMPTS)).tolist()) >= 0.6


def test_other_noise_gives_another_picture(painted):
    likeness = psnr(*painted.pairs())
    plain = painted.bed.subjects != "emoji"  # photographs have parts of one colour
    assert (likeness.median() if plain else likeness.max()) < 30.0


def likeliest_motion(foreground):
    """The motion that makes the last frame out of the first; foreground: one clip [frames, 3, 64, 64]."""
    right, down, left, growth = 2 * torch.tensor(list(data.MOTIONS.values())).float().T
    first = foreground[:1].expand(len(right), -1, -1, -1)
    moved = data.warp(first, left, growth.exp(), torch.ones_like(left), right, down)
    return list(data.MOTIONS)[(moved - foreground[-1]).square().mean((1, 2, 3)).argmin()]


def test_clips_move_as_their_prompts_say(painted):
    if painted.bed.frames == 1:
        pytest.skip("a model of still pictures")
    motions = [likeliest_motion(clip) for clip in painted.foreground()]
    assert share(f" {motion} on " in prompt for motion, prompt in zip(motions, painted.prompts)) >= 0.6


def test_a_distilled_model_draws_as_its_teacher_does_with_guidance(painted):
    if not painted.bed.teacher:
        pytest.skip("a model that learnt from pictures")
    teacher = Painter(painted.bed.teacher, painted.prompts)
    full, plain = teacher.full(), teacher.full(steps=painted.bed.steps, cfg=painted.bed.cfg)
    assert decibels(painted.drawn, full) > decibels(plain, full) + 2.0


def test_a_recording_holds_what_the_network_gave(painted):
    given = []
    network = painted.model.model.diffusion_model
    hook = network.register_forward_hook(lambda module, args, output: given.append(output.clone()))
    try:
        recording = record(painted.model, painted.prompts[:2], 3, 4.5, 7, painted.name)
    finally:
        hook.remove()
    for output, cond, uncond in zip(given, recording.cond, recording.uncond):
        halves = torch.stack(output.float().split(2))
        for branch in (cond, uncond):
            assert (halves - branch).abs().amax(tuple(range(1, halves.ndim))).min() < 1e-3
