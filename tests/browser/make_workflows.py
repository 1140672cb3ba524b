"""Makes the shipped workflows, their pictures and their API twins in ComfyUI's own page.

    python dev.py test tests/browser/make_workflows.py

Run it after changing a graph below, or the inputs of a node.
"""

import json
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURE = {"type": "jpeg", "quality": 75, "style": ".comfy-menu-hamburger { visibility: hidden }"}
BUILD = """(nodes) => {
    app.graph.clear();
    const made = {};
    for (const [name, { type, at, size, title, widgets }] of Object.entries(nodes)) {
        const node = made[name] = LiteGraph.createNode(type);
        node.pos = at;
        if (title) node.title = title;
        app.graph.add(node);
        for (const widget of node.widgets ?? []) widget.value = widgets[widget.name] ?? widget.value;
        if (size) node.setSize(size);
    }
    for (const [name, { links }] of Object.entries(nodes))
        for (const [input, [from, slot]] of Object.entries(links)) made[from].connect(slot, made[name], input);
}"""


def node(type, at, *, title=None, size=None, **inputs):
    """A node at (x, y). An input is a value, or (name of another node, its output) for a link."""
    links = {name: value for name, value in inputs.items() if isinstance(value, tuple)}
    widgets = {name: value for name, value in inputs.items() if not isinstance(value, tuple)}
    return {"type": type, "at": at, "title": title, "size": size, "links": links, "widgets": widgets}


def note(at, size, text):
    """A note that says what to do."""
    return node("MarkdownNote", at, title="Read me", size=size, text=text)


def sampler(at, title, model, seed, **inputs):
    """A KSampler on the outputs of the nodes `positive`, `negative` and `latent`."""
    return node(
        "KSampler",
        at,
        title=title,
        model=model,
        seed=seed,
        control_after_generate="fixed",
        positive=("positive", 0),
        negative=("negative", 0),
        latent_image=("latent", 0),
        **inputs,
    )


DEMO_NOTE = """\
## Full sampling beside FasterCache
1. Press **Run**. Both samplers use the same seed and prompt.
2. Each line of the positive prompt is one picture.
3. **FasterCache** says how much of the work was done, **Compare** how far the pictures are apart, \
**Report** what happened at each step.

Try another `preset`, or fewer `steps`. The model is the small one that lies in `testbed/models`."""

PHOTO = "a lighthouse on a rocky coast at dusk, warm light in the windows, waves, detailed photograph"
OWN_NOTE = """\
## One node, the same picture, less work
1. Choose {file} in **Load Checkpoint**, or any other that you have.
2. Press **Run**. **FasterCache** says how much of the work was done.
3. Bypass **FasterCache** (Ctrl+B) and run again with the same seed to see the full picture.

If the picture changes too much: preset `exact-looking`, or a higher `start_percent`. Use 20 steps or more."""
FIND_NOTE = """\
## Which steps does your own model need?
1. Choose {file} in **Load Checkpoint**, or any other that you have.
2. Press **Run**. **Auto-FR** samples a few pictures in full and finds a policy; that takes the time of about \
two samplings and happens once. **FRDiff** then follows it.
3. Change **Positive** or the seed of **KSampler** as you like: the policy stays. It is also in \
`output/fastercache`, for **FasterCache Policy Load**.

Keep steps, cfg, sampler and scheduler the same in **Auto-FR** and **KSampler**."""


CHOOSE = "1. Choose {file} in **Load Checkpoint**, or any other that you have.\n2. Press **Run**."
FRDIFF_NOTE = f"""\
## FRDiff as published
{CHOOSE}

Every second step is computed in full. Early steps between hold the last output, late ones reuse features, those \
in the middle mix both: 50 DDIM steps, as in the paper. A policy from **FasterCache Auto-FR** is closer."""
FEATURES_NOTE = f"""\
## Reused features within 2 GB
{CHOOSE}

For samplers that add noise at every step, where no step can be skipped. The log and the report say which parts of the \
network fit into `memory_gb`."""
KSAMPLER_NOTE = f"""\
## One node that samples and skips
{CHOOSE}

Choose another `method`: the node shows its inputs. What nodes before it put on the model stays. **Report** says what \
was skipped."""
GUIDER_NOTE = f"""\
## CFG-Cache for SamplerCustomAdvanced
{CHOOSE}

**FasterCache Guider** takes the place of **CFGGuider**. It says how much of the work was done."""
VIDEO_NOTE = f"""\
## FasterCache as published, on a video model
{CHOOSE}

The preset `paper` takes the published settings for Mochi: the negative pass runs once in five steps from a third of \
sampling on, and attention comes from the cache between. `balanced` is closer."""


def demo():
    """The emoji model sampled in full and with FasterCache."""
    sampling = {"steps": 30, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "note": note([0, 0], [340, 330], DEMO_NOTE),
        "load": node("UNETLoader", [0, 380], size=[340, 82], unet_name="emoji_mmdit.safetensors"),
        "positive": node(
            "EmojiPrompt",
            [0, 510],
            title="Positive",
            size=[340, 120],
            prompts="red apple on blue\ncookie on yellow\nred heart on teal\npanda face on purple",
        ),
        "negative": node("EmojiPrompt", [0, 680], title="Negative", size=[340, 90], prompts=""),
        "latent": node("EmptySD3LatentImage", [0, 820], size=[340, 106], width=128, height=128, batch_size=4),
        "seed": node(
            "PrimitiveInt", [0, 980], title="Seed for both", size=[340, 82], value=20, control_after_generate="fixed"
        ),
        "cache": node("FasterCache", [400, 0], size=[300, 350], model=("load", 0)),
        "sample": sampler([760, 0], "With FasterCache", ("cache", 0), ("seed", 0), **sampling),
        "sample full": sampler([760, 560], "In full", ("load", 0), ("seed", 0), **sampling),
        "decode": node("EmojiDecode", [1090, 0], size=[210, 58], samples=("sample", 0), scale=4),
        "decode full": node("EmojiDecode", [1090, 560], size=[210, 58], samples=("sample full", 0), scale=4),
        "ours": node("PreviewImage", [1360, 0], title="With FasterCache", size=[420, 500], images=("decode", 0)),
        "full": node("PreviewImage", [1360, 560], title="In full", size=[420, 500], images=("decode full", 0)),
        "report": node("FasterCacheReport", [1840, 0], size=[520, 500], model=("cache", 0), latent=("sample", 0)),
        "compare": node(
            "FasterCacheCompare", [1840, 560], size=[520, 260], reference=("decode full", 0), other=("decode", 0)
        ),
        "difference": node("PreviewImage", [1840, 870], title="Difference", size=[520, 190], images=("compare", 2)),
    }


def text_to_image(checkpoint, model, latent, sampling, prefix, between=(), cache=None, text=OWN_NOTE):
    """A person's own checkpoint with FasterCache; `between` holds nodes before the cache, `cache` another one."""
    return {
        "note": note([0, 0], [360, 340], text.format(file=f"`{checkpoint}`")),
        "load": node("CheckpointLoaderSimple", [0, 400], size=[360, 98], ckpt_name=checkpoint),
        **dict(between),
        "positive": node("CLIPTextEncode", [420, 400], title="Positive", size=[360, 140], clip=("load", 1), text=PHOTO),
        "negative": node(
            "CLIPTextEncode",
            [420, 600],
            title="Negative",
            size=[360, 110],
            clip=("load", 1),
            text="blurry, low quality",
        ),
        "latent": node(latent, [420, 770], size=[360, 106], width=1024, height=1024, batch_size=1),
        "cache": cache or node("FasterCache", [840, 0], size=[300, 350], model=model),
        "sample": sampler([1200, 400], None, ("cache", 0), 20, denoise=1.0, **sampling),
        "decode": node("VAEDecode", [1550, 400], size=[210, 46], samples=("sample", 0), vae=("load", 2)),
        "save": node("SaveImage", [1820, 400], size=[460, 480], images=("decode", 0), filename_prefix=prefix),
        "report": node("FasterCacheReport", [1550, 0], size=[730, 340], model=("cache", 0), latent=("sample", 0)),
    }


def sdxl():
    """SDXL."""
    sampling = {"steps": 30, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    return text_to_image("sd_xl_base_1.0.safetensors", ("load", 0), "EmptyLatentImage", sampling, "FasterCache")


def sd35():
    """Stable Diffusion 3.5."""
    sampling = {"steps": 30, "cfg": 4.5, "sampler_name": "euler", "scheduler": "sgm_uniform"}
    shift = node("ModelSamplingSD3", [420, 0], size=[360, 58], model=("load", 0), shift=3.0)
    return text_to_image(
        "sd3.5_large_fp8_scaled.safetensors",
        ("shift", 0),
        "EmptySD3LatentImage",
        sampling,
        "FasterCache",
        [("shift", shift)],
    )


SDXL = "sd_xl_base_1.0.safetensors"
SDXL_SAMPLING = {"steps": 30, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}


def frdiff():
    """FRDiff as published, on SDXL."""
    cache = node("FasterCacheFRDiff", [840, 0], size=[300, 350], model=("load", 0), interval=2, score_mixing="paper")
    sampling = {**SDXL_SAMPLING, "steps": 50, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
    return text_to_image(SDXL, None, "EmptyLatentImage", sampling, "FRDiff", cache=cache, text=FRDIFF_NOTE)


def features():
    """Feature reuse within a budget of memory, where steps cannot be skipped."""
    inputs = {"preset": "none", "feature_reuse": "fitted", "memory_gb": 2.0}
    cache = node("FasterCache", [840, 0], size=[300, 350], model=("load", 0), **inputs)
    sampling = {**SDXL_SAMPLING, "sampler_name": "euler_ancestral"}
    return text_to_image(SDXL, None, "EmptyLatentImage", sampling, "Features", cache=cache, text=FEATURES_NOTE)


def ksampler():
    """The KSampler with a method, on SDXL."""
    graph = text_to_image(SDXL, None, "EmptyLatentImage", SDXL_SAMPLING, "KSampler", cache=True, text=KSAMPLER_NOTE)
    del graph["cache"], graph["report"]
    graph["sample"] = {
        **sampler([840, 0], None, ("load", 0), 20, denoise=1.0, method="automatic", **SDXL_SAMPLING),
        "type": "FasterCacheKSampler",
        "size": [340, 500],
    }
    graph["text"] = node("PreviewAny", [1240, 0], title="Report", size=[640, 340], source=("sample", 1))
    return graph


def guider():
    """CFG-Cache as a guider of SamplerCustomAdvanced, on SDXL."""
    graph = text_to_image(SDXL, None, "EmptyLatentImage", SDXL_SAMPLING, "Guider", cache=True, text=GUIDER_NOTE)
    del graph["cache"], graph["report"]
    given = {"model": ("load", 0), "positive": ("positive", 0), "negative": ("negative", 0)}
    scheduler = {"model": ("load", 0), "scheduler": "normal", "steps": 30, "denoise": 1.0}
    return graph | {
        "guider": node("FasterCacheGuider", [840, 0], size=[320, 340], cfg=7.0, **given),
        "noise": node("RandomNoise", [840, 400], size=[320, 82], noise_seed=20, control_after_generate="fixed"),
        "sampler": node("KSamplerSelect", [840, 540], size=[320, 58], sampler_name="euler"),
        "sigmas": node("BasicScheduler", [840, 650], size=[320, 106], **scheduler),
        "sample": node(
            "SamplerCustomAdvanced",
            [1220, 400],
            size=[260, 106],
            latent_image=("latent", 0),
            **{name: (name, 0) for name in ("noise", "guider", "sampler", "sigmas")},
        ),
    }


def video():
    """FasterCache as published on Mochi, a model of the paper: CFG-Cache and dynamic feature reuse."""
    cache = node("FasterCache", [840, 0], size=[300, 350], model=("load", 0), preset="paper", memory_device="cpu")
    sampling = {"steps": 64, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}
    graph = text_to_image(
        "mochi_preview_fp8_scaled.safetensors",
        None,
        "EmptyMochiLatentVideo",
        sampling,
        "",
        cache=cache,
        text=VIDEO_NOTE,
    )
    graph["latent"]["widgets"] = {"width": 848, "height": 480, "length": 37, "batch_size": 1}
    saving = {"filename_prefix": "FasterCache", "fps": 24.0, "lossless": False, "quality": 90, "method": "default"}
    graph["save"] = node("SaveAnimatedWEBP", [1820, 400], size=[460, 480], images=("decode", 0), **saving)
    return graph


def auto_fr():
    """SDXL with the policy that Auto-FR finds for it."""
    checkpoint = "sd_xl_base_1.0.safetensors"
    sampling = {"steps": 30, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    prompts = {"positive": ("typical", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)}
    return {
        "note": note([0, 0], [360, 440], FIND_NOTE.format(file=f"`{checkpoint}`")),
        "load": node("CheckpointLoaderSimple", [0, 500], size=[360, 98], ckpt_name=checkpoint),
        "typical": node(
            "CLIPTextEncode",
            [420, 0],
            title="A typical prompt",
            size=[360, 140],
            clip=("load", 1),
            text="a market street in the rain, people with umbrellas, reflections, detailed photograph",
        ),
        "positive": node("CLIPTextEncode", [420, 500], title="Positive", size=[360, 140], clip=("load", 1), text=PHOTO),
        "negative": node(
            "CLIPTextEncode",
            [420, 700],
            title="Negative",
            size=[360, 110],
            clip=("load", 1),
            text="blurry, low quality",
        ),
        "latent": node("EmptyLatentImage", [420, 870], size=[360, 106], width=1024, height=1024, batch_size=1),
        "find": node(
            "FasterCacheAutoFR",
            [840, 0],
            size=[340, 430],
            model=("load", 0),
            seed=1000,
            control_after_generate="fixed",
            budget=0.5,
            **prompts,
            **sampling,
        ),
        "cache": node("FasterCacheFRDiff", [840, 500], size=[340, 400], model=("load", 0), policy=("find", 0)),
        "sample": sampler([1240, 500], None, ("cache", 0), 20, **sampling),
        "decode": node("VAEDecode", [1580, 500], size=[210, 46], samples=("sample", 0), vae=("load", 2)),
        "save": node("SaveImage", [1850, 500], size=[460, 480], images=("decode", 0), filename_prefix="FasterCache"),
        "curve": node("PreviewImage", [1240, 0], title="Error at every cost", size=[480, 430], images=("find", 2)),
        "keep": node("FasterCachePolicySave", [1780, 0], size=[370, 230], policy=("find", 0), filename="SDXL euler 30"),
        "report": node("FasterCacheReport", [2210, 0], size=[560, 430], model=("cache", 0), latent=("sample", 0)),
    }


# The demo last: it is run, and the page keeps its pictures for nodes of the same number.
GRAPHS = {
    "FasterCache SDXL": sdxl,
    "FasterCache SD3.5": sd35,
    "FasterCache KSampler": ksampler,
    "FasterCache Guider": guider,
    "FasterCache features": features,
    "FasterCache FRDiff": frdiff,
    "FasterCache video": video,
    "FasterCache Auto-FR": auto_fr,
    "FasterCache demo": demo,
}


@pytest.fixture(scope="module")
def focused(open_editor):
    """The page without its menus."""
    editor = open_editor()
    editor.page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
    return editor


@pytest.mark.parametrize("title", GRAPHS)
def test_make(focused, title):
    focused.page.evaluate(BUILD, GRAPHS[title]())
    focused.fit()
    workflow, prompt = focused.exported()
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, title))
    del workflow["extra"]["ds"]  # the page then shows the whole graph
    write(ROOT / "workflows" / f"{title}.json", workflow)
    write(ROOT / "tests" / "workflows" / f"{title}.json", prompt)
    if title == "FasterCache demo":
        focused.run()
    focused.page.screenshot(path=ROOT / "workflows" / f"{title}.jpg", **PICTURE)


def write(path, data):
    path.write_text(json.dumps(data, indent=1) + "\n")
