"""Graphs for the test bed's model as a program posts them, and what comes out of them."""

import io
import itertools
import json
from typing import Any

import numpy as np

from benchmarks.tools.sampling import MODEL_FILE, Bench
from testbed.beds import node

STEPS, CFG, SEED = 16, 4.5, 20
PROMPTS = {"positive": ["positive", 0], "negative": ["negative", 0]}
EULER = {"sampler_name": "euler", "scheduler": "simple"}
# Follow the interval whatever the error: how many passes run is then known beforehand.
PLAIN = {"interval": 2, "tolerance": 0.0}

Graph = dict[str, Any]


class Graphs:
    """Graphs of a Bench: the nodes before sampling, nodes that sample, and what is measured after it."""

    fresh = itertools.count(1 << 20)

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def ours(self, kind: str, **inputs: Any) -> Graph:
        """One of our nodes with its defaults."""
        return node(kind, **{**self.bench.defaults(kind), **inputs})

    def before(self) -> Graph:
        """The nodes before sampling: "model" counts its rows, "cached" has CFG-Cache."""
        return {
            "load": node("UNETLoader", unet_name=MODEL_FILE, weight_dtype="default"),
            "model": node("CountRows", model=["load", 0], run=next(self.fresh)),
            "positive": node("EmojiPrompt", prompts="dog on blue"),
            "negative": node("EmojiPrompt", prompts=""),
            "empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
            "noise": node("RandomNoise", noise_seed=SEED),
            "sampler": node("KSamplerSelect", sampler_name="euler"),
            "sigmas": node("BasicScheduler", model=["load", 0], scheduler="simple", steps=STEPS, denoise=1.0),
            "cached": self.ours("FasterCacheCFG", model=["model", 0], **PLAIN),
        }

    def guided(self, **inputs: Any) -> Graph:
        """SamplerCustomAdvanced with our guider, whose other `inputs` are its defaults."""
        graph, custom = self.before(), {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
        guided = {"model": ["model", 0], **PROMPTS, "cfg": CFG, **PLAIN, **inputs}
        graph["guider"] = self.ours("FasterCacheGuider", **guided)
        graph["sample"] = node("SamplerCustomAdvanced", **custom, latent_image=["empty", 0])
        return graph

    def our_ksampler(self, **inputs: Any) -> Graph:
        """Our KSampler, sampling as `ksampler` does, otherwise with its defaults."""
        graph = self.before()
        graph["sample"] = self.ours("FasterCacheKSampler", **{**ksampler("model")["inputs"], **inputs})
        graph["text"] = node("PreviewAny", source=["sample", 1])
        return graph

    def run(self, graph: Graph, model: str = "model") -> tuple[np.ndarray, int, dict[str, Any]]:
        """(pictures, rows through the network, what the nodes showed) of the node "sample"."""
        after = {
            "count": node("RowCount", model=[model, 0], latent=["sample", 0]),
            "decode": node("EmojiDecode", samples=["sample", 0], scale=1),
            "save": node("SaveArray", images=["decode", 0]),
        }
        outputs = self.bench.host.run({**graph, **after})
        [array] = outputs["save"]["arrays"]
        return np.load(io.BytesIO(self.bench.host.image(array))), outputs["count"]["rows"][0], outputs


def ksampler(model: str, seed: int = SEED, cfg: float = CFG) -> Graph:
    """The host's KSampler on the node `model`."""
    sampling = {"seed": seed, "steps": STEPS, "cfg": cfg, "denoise": 1.0, "latent_image": ["empty", 0]}
    return node("KSampler", model=[model, 0], **sampling, **EULER, **PROMPTS)


def ksampler_part(model: str, latent: list[Any], first: int, last: int) -> Graph:
    """One part of the host's KSampler (Advanced), of twice STEPS steps."""
    begins = "enable" if first == 0 else "disable"
    noise = {"add_noise": begins, "noise_seed": SEED, "return_with_leftover_noise": begins}
    steps = {"steps": STEPS * 2, "cfg": CFG, "start_at_step": first, "end_at_step": last}
    return node("KSamplerAdvanced", model=[model, 0], latent_image=latent, **noise, **steps, **EULER, **PROMPTS)


def report(model: str) -> Graph:
    """Our Report node for the run of the node "sample"."""
    return node("FasterCacheReport", model=[model, 0], latent=["sample", 0])


def report_of(outputs: dict[str, Any]) -> dict[str, Any]:
    """What the node "report" gave, as JSON data."""
    return json.loads(outputs["report"]["fastercache_report"][0])
