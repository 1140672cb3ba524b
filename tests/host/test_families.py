"""Feature reuse on further families of the host, with what only they are given: audio, poses, lyrics."""

import functools

import pytest
import torch
from fastercache_pack.nodes.host.families import find_family
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import STILL, host_picture, reused_as_computed, reusing, shuffled_batches
from support.further import FURTHER, FURTHER_CASES, PAIRED, given, know_further, options
from support.runs import relative
from support.tiny import sample


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The further families, for as long as a test runs."""
    know_further(monkeypatch)


@pytest.fixture(scope="module")
def full(tiny_models):
    """The host's own picture, by family, and the layers of the network that run."""
    return functools.cache(
        lambda name: host_picture(tiny_models(name), lambda model: sample(model, name, sigmas=STILL, **options(name)))
    )


@pytest.mark.parametrize("name, kind", FURTHER_CASES)
def test_what_is_reused_does_not_run_and_is_what_would_have_been_computed(tiny_models, full, monkeypatch, name, kind):
    theirs, layers = full(name)
    if name not in PAIRED:
        shuffled_batches(monkeypatch)
    reused_as_computed(tiny_models(name), name, kind, theirs, layers, **options(name))


@pytest.mark.parametrize("name", list(FURTHER))
def test_storing_changes_nothing_and_the_branches_differ(tiny_models, full, name):
    theirs, _ = full(name)
    kinds = [kind for n, kind in FURTHER_CASES if n == name]
    assert find_family(tiny_models(name).model.diffusion_model).kinds() == set(kinds)
    for together in ([kind for kind in kinds if kind != "stack"], ["stack"]):
        model = attach(tiny_models(name), reusing(*together, every=1))
        assert torch.equal(sample(model, name, sigmas=STILL, **options(name)), theirs)
        assert last_report(model)["run"]["features"]["sites"] > 0, "it did store"
    swapped = sample(tiny_models(name), name, sigmas=STILL, **{**options(name), "negative": given(name, 1)})
    assert relative(swapped, theirs) > 0.003, "guidance acts"
