"""Feature reuse on families that only newer hosts have: by their entry, or in blocks that are found as they run."""

import functools

import pytest
import torch
from comfy.utils import pack_latents
from fastercache_pack.fastercache_core import messages
from fastercache_pack.nodes.host.families import find_family
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support import tiny
from support.features import (
    ATTENTION,
    BLOCKS,
    SPANS,
    STILL,
    chosen_by_node,
    host_picture,
    reused_as_computed,
    reusing,
    shuffled_batches,
    told,
)
from support.newer import ENTERED, NEWER, given, know_newer, lacks
from support.runs import actions, evaluations, relative

# Modules whose output is an attention's, of the families with an entry that names them.
OWN_ATTENTION = {
    "minimax_h3": {"self": r"^blocks\.\d+\.attn\."},
    "ace15": {"self": r"decoder\.layers\.\d+\.self_attn\.", "cross": r"decoder\.layers\.\d+\.cross_attn\."},
}
CASES = [(name, kind) for name in NEWER for kind in (*OWN_ATTENTION.get(name, ()), *SPANS)]


@pytest.fixture(autouse=True)
def known(monkeypatch, request):
    """The newer families, for as long as a test runs, where the host has the one that it is about."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name and lacks(name):
        pytest.skip(lacks(name))
    know_newer(monkeypatch)
    for family, spec in NEWER.items():
        monkeypatch.setitem(BLOCKS, family, spec["blocks"])
        monkeypatch.setitem(ATTENTION, family, OWN_ATTENTION.get(family, {}))


def batches(name):
    """True where the host runs any branches and latents together."""
    return not ("audio" in NEWER[name] or "mixes" in NEWER[name])


def sample(model, name, **options):
    """Sample the family with all that it is given, [batch, ...]."""
    audio = NEWER[name].get("audio")
    options = {"positive": given(name, 1), "negative": given(name, 2), "batch": 2 if batches(name) else 1, **options}
    if audio:
        from comfy.nested_tensor import NestedTensor

        options["latent"] = NestedTensor([torch.zeros(1, *shape) for shape in (NEWER[name]["lat"], audio)])
    samples = tiny.sample(model, name, **options)
    return pack_latents(samples.unbind())[0] if audio else samples


@pytest.fixture(scope="module")
def full(tiny_models):
    """The host's own picture, by family, and the layers of the network that run."""
    return functools.cache(
        lambda name: host_picture(tiny_models(name), lambda model: sample(model, name, sigmas=STILL))
    )


@pytest.mark.parametrize("name, kind", CASES)
def test_what_is_reused_does_not_run_and_is_what_would_have_been_computed(tiny_models, full, monkeypatch, name, kind):
    theirs, layers = full(name)
    if batches(name):
        shuffled_batches(monkeypatch)
    reused_as_computed(tiny_models(name), name, kind, theirs, layers, sample)


@pytest.mark.parametrize("name", list(NEWER))
def test_storing_changes_nothing_and_the_branches_differ(tiny_models, full, name):
    theirs, _ = full(name)
    for kind in ("stack", "rear"):
        model = attach(tiny_models(name), reusing(kind, every=1))
        assert torch.equal(sample(model, name, sigmas=STILL), theirs)
        assert last_report(model)["run"]["features"]["sites"] > 0, "it did store"
    swapped = sample(tiny_models(name), name, sigmas=STILL, negative=given(name, 1))
    assert relative(swapped, theirs) > 0.003, "guidance acts"


@pytest.mark.parametrize("name", list(NEWER))
def test_automatic_takes_all_blocks_and_says_where_they_are_from(tiny_models, name):
    model = attach(tiny_models(name), chosen_by_node())
    sample(model, name, steps=12)
    assert last_report(model)["run"]["features"]["depth"] == "all blocks" and evaluations(model)["reused"] >= 4
    family = find_family(model.model.diffusion_model)
    assert family.name == ENTERED.get(name, family.name) and family.known == (name in ENTERED)
    if not family.known:
        assert messages.found_blocks(family.name, NEWER[name]["blocks"]) in told(model)


@pytest.mark.parametrize("name", ["wan_animate2"])
@pytest.mark.parametrize("kind", SPANS)
def test_a_pose_and_what_the_host_caches_of_it_stay_as_they_are(tiny_models, name, kind):
    """The host's own cache is filled by real passes alone, and the pose still acts where blocks are reused."""
    from comfy.ldm.wan.model_animate2 import PoseBranchCache

    pose = {"pose_video_latent": torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(6))}
    posed = {"positive": tiny.conditioning(name, 1, **pose), "cfg": 1.0, "batch": 1}  # one branch: the cache has one

    def cached():
        model, cache = tiny_models(name), PoseBranchCache()
        model.model_options["transformer_options"]["animate2_cache"] = cache
        return model, cache

    theirs = sample(cached()[0], name, sigmas=STILL, **posed)
    assert relative(sample(tiny_models(name), name, sigmas=STILL, cfg=1.0, batch=1), theirs) > 0.003, "it acts"
    model, cache = cached()
    model = attach(model, reusing(kind))
    held = sample(model, name, sigmas=STILL, **posed)
    assert "reused" in actions(model) and relative(held, theirs) < 1e-4, told(model)
    assert [type(slot["key"]) for slot in cache.slots] == [torch.Tensor] and cache.filled(3)
