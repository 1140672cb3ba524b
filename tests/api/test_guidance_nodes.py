"""CFG-Cache through the host's samplers over HTTP, as a program posts them."""

import numpy as np
import pytest

from benchmarks.tools.sampling import Bench
from support.graphs import CFG, PROMPTS, SEED, STEPS, Graphs, ksampler, ksampler_part, report, report_of
from testbed.beds import node
from testbed.server import HostError

SKIPPED = 6  # every second one after the first three, but not the last


@pytest.fixture(scope="module")
def graphs(host):
    return Graphs(Bench(host))


@pytest.fixture(scope="module")
def full(graphs):
    """The picture in full by the host's own KSampler, and another seed's."""
    runs = [graphs.run({**graphs.before(), "sample": ksampler("model", seed)}) for seed in (SEED, SEED + 1)]
    assert [rows for _, rows, _ in runs] == [2 * STEPS] * 2
    return runs[0][0], runs[1][0]


def near(picture, full):
    """Nearer to the full picture than a quarter of the way to another seed's, and not the same."""
    error, control = (np.sqrt(np.mean((other - full[0]) ** 2)) for other in (picture, full[1]))
    return 0 < error < 0.25 * control


@pytest.mark.parametrize("interval, rows", [(1, 2 * STEPS), (2, 2 * STEPS - SKIPPED)])
def test_our_guider_in_sampler_custom_advanced(graphs, full, interval, rows):
    picture, run, _ = graphs.run(graphs.guided(interval=interval))
    assert run == rows
    assert np.array_equal(picture, full[0]) if interval == 1 else near(picture, full)


def test_our_ksampler_shows_its_report_as_text(graphs, full):
    picture, rows, outputs = graphs.run(graphs.our_ksampler(method="CFG-Cache as published"))
    [text] = outputs["text"]["text"]
    assert rows < 2 * STEPS and f"{rows} of {2 * STEPS} rows" in text
    assert all(word in text for word in ("estimated", "cfg: 4.5", f"steps: {STEPS}", "uncond"))
    assert np.isfinite(picture).all() and not np.array_equal(picture, full[0])


def test_our_ksampler_with_nothing_to_skip_is_the_hosts_own(graphs, full):
    picture, rows, outputs = graphs.run(graphs.our_ksampler(method="CFG-Cache as measured", interval=1))
    assert np.array_equal(picture, full[0]) and rows == 2 * STEPS
    assert "nothing was skipped" in outputs["text"]["text"][0]


def in_two_parts(graphs, model):
    graph = graphs.before()
    graph["first"] = ksampler_part(model, ["empty", 0], 0, STEPS)
    graph["sample"] = ksampler_part(model, ["first", 0], STEPS, 10000)
    return graphs.run({**graph, **({"report": report(model)} if model == "cached" else {})})


def test_ksampler_advanced_in_two_parts_skips_in_both(graphs, full):
    picture, rows, outputs = in_two_parts(graphs, "cached")
    theirs, all_rows, _ = in_two_parts(graphs, "model")
    assert (all_rows, rows) == (4 * STEPS, 4 * STEPS - 2 * SKIPPED)
    second = report_of(outputs)
    assert second["totals"]["evaluations"] == {"computed": STEPS - SKIPPED, "estimated": SKIPPED}
    assert second["evaluations"][-1]["actions"] == {"cond": "computed", "uncond": "computed"}
    assert near(picture, (theirs, full[1]))


def test_sampler_custom(graphs, full):
    graph = {**graphs.before(), "report": report("cached")}
    taken = {name: [source, 0] for name, source in {"model": "cached", "latent_image": "empty"}.items()}
    taken |= {name: [name, 0] for name in ("sampler", "sigmas")}
    graph["sample"] = node("SamplerCustom", add_noise=True, noise_seed=SEED, cfg=CFG, **PROMPTS, **taken)
    picture, rows, outputs = graphs.run(graph)
    assert rows == report_of(outputs)["totals"]["rows"] == 2 * STEPS - SKIPPED
    assert near(picture, full)


def test_at_cfg_1_nothing_is_skipped_and_the_report_says_why(graphs):
    graph = {**graphs.before(), "sample": ksampler("cached", cfg=1.0), "report": report("cached")}
    _, rows, outputs = graphs.run(graph)
    assert rows == STEPS
    assert any("cfg is 1.0" in note for note in report_of(outputs)["notes"])


@pytest.mark.parametrize(
    "inputs, word",
    [
        ({"forecast": "guess"}, "forecast"),
        ({"interval": 0}, "interval"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent"),
    ],
)
def test_a_wrong_input_of_our_guider_is_named(graphs, inputs, word):
    with pytest.raises(HostError) as error:
        graphs.run(graphs.guided(**inputs))
    assert "FasterCacheGuider" in str(error.value) and word in str(error.value)


@pytest.mark.parametrize(
    "inputs, says",
    [
        ({"sampler_name": "res_2s"}, "sampler_name is 'res_2s'; it must be one of: euler, "),
        ({"scheduler": "bong_tangent"}, "scheduler is 'bong_tangent'; it must be one of: "),
        ({"start_percent": float("nan")}, "start_percent is nan; it must be a number from 0 to 1."),
        ({"preset": {"balanced": 1}}, "preset is {'balanced': 1}; it must be one of: "),
        ({"model": "emoji_mmdit"}, "model is 'emoji_mmdit'; it must be a MODEL."),
        ({"positive": 3}, "positive is 3; it must be a CONDITIONING."),
    ],
)
def test_what_our_ksampler_cannot_take_is_named_with_what_it_can(graphs, inputs, says):
    with pytest.raises(HostError, match="FasterCacheKSampler") as error:
        graphs.run(graphs.our_ksampler(**inputs))
    # What newer hosts refuse by themselves they name in words of their own.
    refused = any(words in str(error.value) for words in ("Value not in list", "Return type mismatch"))
    assert says in str(error.value) or (refused and next(iter(inputs)) in str(error.value)), str(error.value)


def test_a_queue_of_fifty_alternating_prompts_changes_none_of_them(graphs):
    kinds = [
        {"preset": "fast", "seed": 1},
        {"method": "CFG-Cache as measured", "seed": 1},
        {"method": "FRDiff", "seed": 2},
    ]
    first: dict[int, np.ndarray] = {}
    for number in range(50):
        kind = number % len(kinds)
        picture, _, _ = graphs.run(graphs.our_ksampler(steps=6, **kinds[kind]))
        assert np.array_equal(picture, first.setdefault(kind, picture)), f"prompt {number}"
