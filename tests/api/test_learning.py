"""Learning on one's own model through a real server: a switch, a picture, and the next run knows it."""

import json

from testbed.beds import BEDS, node

BED = BEDS["mmdit"]


def said(host, seed, **inputs):
    """The report of the KSampler with FasterCache on one picture."""
    links = {name: [name, 0] for name in ("positive", "negative")}
    sampling = dict(seed=seed, steps=12, cfg=1.0, sampler_name="res_multistep", scheduler=BED.scheduler, denoise=1.0)
    cache = dict(method="automatic", preset="fast", closeness=30.0, start_percent=0.0, end_percent=1.0)
    unused = dict(interval=2, score_mixing="paper")
    sampler = dict(model=["load", 0], latent_image=["empty", 0])
    graph = BED.graph(BED.prompts("tuning")[:1]) | {
        "sample": node("FasterCacheKSampler", **sampler, **links, **sampling, **cache, **unused, **inputs),
        "show": node("PreviewAny", source=["sample", 1]),
    }
    [text] = host.run(graph)["show"]["text"]
    return text


def test_a_picture_teaches_the_next_run_and_the_file_says_for_which_model(host):
    assert "calibrated" not in said(host, 1)
    lesson, after = said(host, 2, learn=True), said(host, 3)
    kind = "calibrated on this model, res_multistep, up to 12 steps, 1 picture: "
    assert "measured: " in lesson and f"the next run is {kind}" in lesson
    assert f"note: {kind}" in after and "measured: " not in after
    [file] = (host.folder / "output" / "fastercache" / "learnt").iterdir()
    assert file.name.startswith("SD3 ") and json.loads(file.read_text())["model"] == file.stem
