"""Caches of other packs on the same model: seen by what they do, wherever they sit and whatever they are called."""

import pytest
import torch
from comfy_extras import nodes_easycache, nodes_slg
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host.network_watch import blocks_of
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.guidance import cfg_cache, with_steps
from support.others import CACHES, FAMILY, Memory
from support.runs import evaluations, notes, relative, totals
from support.tiny import SPECS, sample

STEPS = 16
SETTINGS = {"steps": with_steps(), "cfg": cfg_cache(), "none": PRESETS["none"](Window())}


def beside(tiny_models, kind, settings=None, last=True):
    """(latent, MODEL, the other cache) of a run beside another cache; last: it was put on the model after ours."""
    family, memory = FAMILY.get(kind, "sd3"), Memory()
    model = tiny_models(family)
    if settings and last:
        model = attach(model, settings)
    CACHES[kind](model, memory)
    if settings and not last:
        model = attach(model, settings)
    return sample(model, family, steps=STEPS), model, memory


@pytest.mark.parametrize("last", [True, False], ids=["after ours", "before ours"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", CACHES)
def test_another_cache_is_noticed_and_ours_makes_way(tiny_models, kind, settings, last):
    family = FAMILY.get(kind, "sd3")
    full = sample(tiny_models(family), family, steps=STEPS)
    theirs, _, memory = beside(tiny_models, kind)
    assert memory.answers >= 5
    ours, model, memory = beside(tiny_models, kind, SETTINGS[settings], last)
    report, answers = last_report(model), [i for i, r in enumerate(last_report(model)["evaluations"]) if not r["rows"]]
    skipped = [i for i, r in enumerate(report["evaluations"]) if {*r["actions"].values()} - {"computed"}]
    assert notes(model)[-1] == messages.answered_elsewhere(memory.answers, STEPS)
    assert totals(model)["rows_full"] == 2 * STEPS, "what full sampling would run"
    first = min(set(answers) - set(skipped))
    assert all(i < first for i in skipped), "from the first answer on nothing is skipped here"
    assert settings != "none" or torch.equal(ours, theirs)
    assert relative(ours, full) < 2 * relative(theirs, full) + 0.1


def test_the_hosts_own_caches_are_left_alone_from_the_start(tiny_models):
    for put, family in ((nodes_easycache.EasyCacheNode, "flux"), (nodes_easycache.LazyCacheNode, "sd3")):
        theirs = put.execute(tiny_models(family), 0.2, 0.15, 0.95, False).result[0]
        model = attach(theirs, SETTINGS["steps"])
        assert torch.equal(sample(model, family, steps=STEPS), sample(theirs, family, steps=STEPS))
        assert notes(model)[0] == messages.EASYCACHE


@pytest.mark.parametrize("family", sorted(SPECS))
def test_the_blocks_of_every_family_are_watched_and_nothing_is_left_on_them(tiny_models, family):
    model = attach(tiny_models(family), SETTINGS["cfg"])
    network = model.model.diffusion_model
    ran = []
    hooks = [block.register_forward_pre_hook(lambda *_: ran.append(1)) for block in blocks_of(network)]
    sample(model, family, steps=2)
    for hook in hooks:
        hook.remove()
    assert len(ran) >= 2 and not any(module._forward_pre_hooks for module in network.modules())
    assert not any("answered" in note for note in notes(model))


def test_guidance_by_skipped_layers_is_no_cache(tiny_models):
    slg = nodes_slg.SkipLayerGuidanceDiT.execute(tiny_models("sd3"), 3.0, 0.0, 1.0, "1", "").result[0]
    model = attach(slg, SETTINGS["cfg"])
    sample(model, "sd3", steps=STEPS)
    assert evaluations(model)["estimated"] > 3 and not any("answered" in note for note in notes(model))


def test_every_row_that_ran_is_told_with_those_of_probes(tiny_models):
    from support.features import chosen_by_node

    settings = PRESETS["fast"](Window())
    model = attach(tiny_models("sd15"), type(settings)(**{**vars(settings), "reuse": chosen_by_node().reuse}))
    rows = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    sample(model, "sd15", steps=20, sampler="euler_ancestral", latent=torch.zeros(1, 4, 8, 8))
    hook.remove()
    assert totals(model)["rows"] == sum(rows) and totals(model)["probe_rows"] > 0
