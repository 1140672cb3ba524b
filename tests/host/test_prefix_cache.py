"""Feature reuse where the host keeps keys and values of what comes before the latent: Qwen-Image 2.1.

Its first pass runs every block twice, on prompt and references and on the latent; later passes run the latent's tokens
only. Older hosts do not have it: the model here is the tests' own, named as the host's.
"""

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from fastercache_pack.nodes.host.families import find_family
from fastercache_pack.nodes.host.wrappers import attach

from support.features import ACTIONS, SPANS, STILL, reusing, shuffled_batches, told
from support.runs import actions, relative
from support.tiny import SPECS, sample

WIDTH, HEADS, DEPTH = 32, 4, 4
Linear = comfy.ops.disable_weight_init.Linear


class Block(torch.nn.Module):
    """Adds to its input in place."""

    def __init__(self):
        super().__init__()
        self.inner, self.ran = Linear(WIDTH, 3 * WIDTH), []

    def forward(self, x, time, attend, rotation, prefix, options):
        self.ran.append(prefix > 0)
        x += attend(*(self.inner(x) * time).chunk(3, -1))
        return x


class QwenImage21Transformer2DModel(torch.nn.Module):
    """keeps: whether keys and values of the prompt outlast a pass."""

    __module__ = "comfy.ldm.qwen_image21.model"

    def __init__(self, channels, context, keeps):
        super().__init__()
        self.dtype, self.keeps, self.kept = torch.float32, keeps, []
        self.into, self.out, self.time = Linear(channels, WIDTH), Linear(WIDTH, channels), Linear(1, WIDTH)
        self.text = Linear(context, WIDTH)
        self.transformer_blocks = torch.nn.ModuleList(Block() for _ in range(DEPTH))
        generator = torch.Generator().manual_seed(4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def forward(self, x, timesteps, context=None, transformer_options=None, **kwargs):
        tokens = self.into(x.flatten(2).mT)
        time = 1 + self.time(timesteps[:, None] / 1000)[:, None].tanh().repeat(1, 1, 1)
        kept = next((kept for given, kept in self.kept if torch.equal(given, context)), None)
        prompt, fresh = self.text(context), []
        for i, block in enumerate(self.transformer_blocks):
            if kept is None:
                prompt = block(prompt, 1.0, self._prompt(fresh, transformer_options), None, prompt.shape[1], None)
            keys, values = (kept or fresh)[i]
            tokens = block(tokens, time[..., :1], self._latent(keys, values, transformer_options), None, 0, None)
        if kept is None and self.keeps:
            self.kept = [*self.kept, (context, fresh)]
        return self.out(tokens).mT.unflatten(2, x.shape[2:])

    def _prompt(self, fresh, options):
        def attend(q, k, v):
            fresh.append((k, v))
            return optimized_attention(q, k, v, HEADS, transformer_options=options)

        return attend

    def _latent(self, keys, values, options):
        def attend(q, k, v):
            k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
            return optimized_attention(q, k, v, HEADS, transformer_options=options)

        return attend


@pytest.fixture
def prefixed(tiny_models):
    """Makes a MODEL of the class."""
    patcher = tiny_models("sd15")
    theirs = patcher.model.diffusion_model

    def make(keeps=True):
        spec = SPECS["sd15"]
        patcher.model.diffusion_model = QwenImage21Transformer2DModel(spec["lat"][0], spec["ctx"][1], keeps)
        return patcher.clone()

    yield make
    patcher.model.diffusion_model = theirs


def runs(model):
    """How often every block ran on the latent, and on the prompt."""
    ran = [block.ran for block in model.model.diffusion_model.transformer_blocks]
    return [r.count(False) for r in ran], [r.count(True) for r in ran]


def test_it_has_an_entry_of_its_own(prefixed):
    assert find_family(prefixed().model.diffusion_model).name == "Qwen-Image 2.1"


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("height, width", [(16, 16), (7, 11)])
@pytest.mark.parametrize("kind", SPANS)
def test_the_latents_blocks_are_reused_and_the_prompts_run_as_they_did(
    prefixed, monkeypatch, kind, height, width, keeps
):
    """Also where the prompt has as many tokens as the latent (77), and where the host has no room for what it keeps."""
    still = {"sigmas": STILL, "latent": torch.zeros(2, 4, height, width)}
    plain = prefixed(keeps)
    theirs = sample(plain, "sd15", **still)
    latents, prompts = runs(plain)
    assert relative(theirs[:1], theirs[1:]) > 0.01
    model = attach(prefixed(keeps), reusing(kind))
    held = sample(model, "sd15", **still)
    assert actions(model) == ACTIONS, told(model)
    assert relative(held, theirs) < 1e-4
    left_out = {"front": [1], "rear": [2, 3], "stack": [1, 2, 3]}[kind]
    reused = ACTIONS.count("reused")
    assert runs(model) == ([n - reused * (i in left_out) for i, n in enumerate(latents)], prompts)
    shuffled_batches(monkeypatch)
    assert relative(sample(attach(prefixed(keeps), reusing(kind)), "sd15", **still), theirs) < 1e-4
