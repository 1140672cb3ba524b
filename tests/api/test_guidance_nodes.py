"""CFG-Cache through the host's samplers over HTTP, as a program posts them."""
import io
import itertools
import json

import numpy as np
import pytest
from benchmarks.tools.sampling import MODEL_FILE, Bench, node
from testbed.server import HostError

STEPS, CFG, SEED = 16, 4.5, 20
SKIPPED = 6  # every second one after the first three, but not the last
# Follow the interval and ask no further: how many passes run is then known beforehand.
PLAIN = {"interval": 2, "tolerance": 0.0}


@pytest.fixture(scope="module")
def bench(host):
    return Bench(host)


class Graphs:
    """Graphs for the test bed's model: its nodes before sampling, and what is measured after it."""

    fresh = itertools.count(1 << 20)

    def __init__(self, bench):
        self.bench = bench

    def ours(self, kind, **inputs):
        """One of our nodes with its defaults."""
        return node(kind, **{**self.bench.defaults(kind), **inputs})

    def before(self, seed=SEED, steps=STEPS):
        return {
            "load": node("UNETLoader", unet_name=MODEL_FILE, weight_dtype="default"),
            "model": node("CountRows", model=["load", 0], run=next(self.fresh)),
            "positive": node("EmojiPrompt", prompts="dog on blue"),
            "negative": node("EmojiPrompt", prompts=""),
            "empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
            "noise": node("RandomNoise", noise_seed=seed),
            "sampler": node("KSamplerSelect", sampler_name="euler"),
            "sigmas": node("BasicScheduler", model=["load", 0], scheduler="simple", steps=steps, denoise=1.0),
            "cached": self.ours("FasterCacheCFG", model=["model", 0], **PLAIN),
        }

    def run(self, graph, latent, model="model"):
        """(pictures, rows through the network, what the nodes showed)."""
        after = {
            "count": node("RowCount", model=[model, 0], latent=latent),
            "decode": node("EmojiDecode", samples=latent, scale=1),
            "save": node("SaveArray", images=["decode", 0]),
        }
        outputs = self.bench.host.run({**graph, **after})
        [array] = outputs["save"]["arrays"]
        return np.load(io.BytesIO(self.bench.host.image(array))), outputs["count"]["rows"][0], outputs


@pytest.fixture(scope="module")
def graphs(bench):
    return Graphs(bench)


def ksampler(model, kind="KSampler", seed=SEED, steps=STEPS, **inputs):
    return node(kind, model=[model, 0], seed=seed, steps=steps, cfg=CFG, sampler_name="euler", scheduler="simple",
                positive=["positive", 0], negative=["negative", 0], latent_image=["empty", 0], denoise=1.0, **inputs)


def our_ksampler(graphs, **inputs):
    """FasterCacheKSampler, sampling as `ksampler` does, otherwise with its defaults."""
    return graphs.ours("FasterCacheKSampler", **{**ksampler("model")["inputs"], **inputs})


@pytest.fixture(scope="module")
def full(graphs):
    """The picture in full by the host's own KSampler, and another seed's."""
    pictures = [graphs.run({**graphs.before(), "sample": ksampler("model", seed=seed)}, ["sample", 0])
                for seed in (SEED, SEED + 1)]
    assert [rows for _, rows, _ in pictures] == [2 * STEPS] * 2
    return pictures[0][0], pictures[1][0]


def near(picture, full):
    """Nearer to the full picture than a quarter of the way to another seed's, and not the same."""
    error, control = (np.sqrt(np.mean((other - full[0]) ** 2)) for other in (picture, full[1]))
    return 0 < error < 0.25 * control


def report_of(outputs):
    return json.loads(outputs["report"]["fastercache_report"][0])


def report(model, latent):
    return node("FasterCacheReport", model=[model, 0], latent=latent)


@pytest.mark.parametrize("interval, rows", [(1, 2 * STEPS), (2, 2 * STEPS - SKIPPED)])
def test_our_guider_in_sampler_custom_advanced(graphs, full, interval, rows):
    graph = graphs.before()
    graph["guider"] = graphs.ours("FasterCacheGuider", model=["model", 0], positive=["positive", 0],
                                  negative=["negative", 0], cfg=CFG, **{**PLAIN, "interval": interval})
    graph["sample"] = node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                           sigmas=["sigmas", 0], latent_image=["empty", 0])
    picture, run, _ = graphs.run(graph, ["sample", 0])
    assert run == rows
    assert np.array_equal(picture, full[0]) if interval == 1 else near(picture, full)


def test_our_ksampler_shows_its_report_as_text(graphs, full):
    graph = graphs.before()
    graph["sample"] = our_ksampler(graphs, preset="paper")
    graph["text"] = node("PreviewAny", source=["sample", 1])
    picture, rows, outputs = graphs.run(graph, ["sample", 0])
    [text] = outputs["text"]["text"]
    assert rows < 2 * STEPS and f"{rows} of {2 * STEPS} rows" in text
    assert all(word in text for word in ("ESTIMATE", "REUSE", "cfg: 4.5", f"steps: {STEPS}", "uncond"))
    assert np.isfinite(picture).all() and not np.array_equal(picture, full[0])


def test_our_ksampler_with_nothing_to_skip_is_the_hosts_own(graphs, full):
    graph = graphs.before()
    graph["sample"] = our_ksampler(graphs, preset="none")
    graph["text"] = node("PreviewAny", source=["sample", 1])
    picture, rows, outputs = graphs.run(graph, ["sample", 0])
    assert np.array_equal(picture, full[0]) and rows == 2 * STEPS
    assert "nothing is skipped" in outputs["text"]["text"][0]


def advanced(model, latent, first, last):
    """One part of KSampler (Advanced)."""
    begins = first == 0
    return node("KSamplerAdvanced", model=[model, 0], add_noise="enable" if begins else "disable", noise_seed=SEED,
                steps=STEPS * 2, cfg=CFG, sampler_name="euler", scheduler="simple", positive=["positive", 0],
                negative=["negative", 0], latent_image=latent, start_at_step=first, end_at_step=last,
                return_with_leftover_noise="enable" if begins else "disable")


def in_two_parts(graphs, model):
    graph = graphs.before()
    graph["first"] = advanced(model, ["empty", 0], 0, STEPS)
    graph["sample"] = advanced(model, ["first", 0], STEPS, 10000)
    if model == "cached":
        graph["report"] = report("cached", ["sample", 0])
    return graphs.run(graph, ["sample", 0])


def test_ksampler_advanced_in_two_parts_skips_in_both(graphs, full):
    picture, rows, outputs = in_two_parts(graphs, "cached")
    theirs, all_rows, _ = in_two_parts(graphs, "model")
    assert (all_rows, rows) == (4 * STEPS, 4 * STEPS - 2 * SKIPPED)
    second = report_of(outputs)
    assert second["totals"]["evaluations"] == {"FULL": STEPS - SKIPPED, "ESTIMATE": SKIPPED}
    assert second["evaluations"][-1]["actions"] == {"cond": "FULL", "uncond": "FULL"}
    assert near(picture, (theirs, full[1]))


def test_sampler_custom(graphs, full):
    graph = graphs.before()
    graph["sample"] = node("SamplerCustom", model=["cached", 0], add_noise=True, noise_seed=SEED, cfg=CFG,
                           positive=["positive", 0], negative=["negative", 0], sampler=["sampler", 0],
                           sigmas=["sigmas", 0], latent_image=["empty", 0])
    graph["report"] = report("cached", ["sample", 0])
    picture, rows, outputs = graphs.run(graph, ["sample", 0])
    assert rows == report_of(outputs)["totals"]["rows"] == 2 * STEPS - SKIPPED
    assert near(picture, full)


def test_at_cfg_1_nothing_is_skipped_and_the_report_says_why(graphs):
    graph = graphs.before()
    graph["sample"] = ksampler("cached")
    graph["sample"]["inputs"]["cfg"] = 1.0
    graph["report"] = report("cached", ["sample", 0])
    _, rows, outputs = graphs.run(graph, ["sample", 0])
    assert rows == STEPS
    assert any("cfg is 1.0" in note for note in report_of(outputs)["notes"])


@pytest.mark.parametrize("inputs, word", [({"forecast": "guess"}, "forecast"), ({"interval": 0}, "interval"),
                                          ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent")])
def test_a_wrong_input_of_our_guider_is_named(graphs, inputs, word):
    graph = graphs.before()
    graph["guider"] = graphs.ours("FasterCacheGuider", model=["model", 0], positive=["positive", 0],
                                  negative=["negative", 0], cfg=CFG, **{**PLAIN, **inputs})
    graph["sample"] = node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                           sigmas=["sigmas", 0], latent_image=["empty", 0])
    with pytest.raises(HostError) as error:
        graphs.run(graph, ["sample", 0])
    assert "FasterCacheGuider" in str(error.value) and word in str(error.value)
