"""The demo: held-out prompts sampled in full, with this pack, with fewer steps and with the host's caches.

Writes the pictures, sheet.jpg and summary.json to output/demo/ and prints the summary as a table.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.tools.comparison import sample_all, summarise, table
from benchmarks.tools.pictures import difference, sheet, to_image
from benchmarks.tools.sampling import Bench, Result, Run
from testbed.server import ROOT, Host, plain_errors

# As published: the unconditional pass once in five evaluations from a third of the steps on.
PUBLISHED = {"interval": 5, "tolerance": 0.0, "start_percent": 1 / 3, "forecast": "hold"}
RUNS = [
    Run("full"),
    Run("fastercache", (("FasterCache", {}),)),
    Run("fastercache_cfg", (("FasterCacheCFG", {}),)),
    Run("cfg_paper", (("FasterCacheCFG", {**PUBLISHED, "weights": "paper"}),)),
    Run("cfg_released", (("FasterCacheCFG", {**PUBLISHED, "weights": "released"}),)),
    Run("steps_fastercache", steps_of="fastercache"),
    Run("steps_fastercache_cfg", steps_of="fastercache_cfg"),
    Run("steps_cfg_paper", steps_of="cfg_paper"),
    Run("steps_cfg_released", steps_of="cfg_released"),
    Run("easycache", (("EasyCache", {}),)),
    Run("lazycache", (("LazyCache", {}),)),  # at its default it costs about what ours does
    Run("lazycache_careful", (("LazyCache", {"reuse_threshold": 0.1}),)),
    Run("other_seed", seed=1000),
]
SHEET_ROWS, GAIN = 8, 30
THREADS = 2
OUTPUT = ROOT / "output" / "demo"


def main() -> None:
    """Run everything and write it down."""
    prompts = json.loads((ROOT / "testbed" / "prompts.json").read_text())["report"]
    with Host(threads=THREADS) as host:
        results = sample_all(Bench(host), RUNS, prompts)
    summary = summarise(results)
    write(results, prompts, summary)
    print(table(summary))
    print(f"\nPictures, sheet.jpg and summary.json: {OUTPUT}")


def write(results: Mapping[str, Sequence[Result]], prompts: Sequence[str], summary: dict[str, Any]) -> None:
    """Write pictures, sheet and summary."""
    pictures = {name: np.concatenate([result.pictures for result in batches]) for name, batches in results.items()}
    for name, batch in pictures.items():
        (OUTPUT / name).mkdir(parents=True, exist_ok=True)
        for number, (picture, prompt) in enumerate(zip(batch, prompts), 1):
            to_image(picture).save(OUTPUT / name / f"{number:02}-{re.sub('[^a-z0-9]+', '-', prompt.lower())}.png")
    side_by_side(pictures, prompts).save(OUTPUT / "sheet.jpg", quality=92)
    (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=1))


def side_by_side(pictures: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Image.Image:
    """Full, ours, fewer steps at equal cost, and the differences to full, for the first prompts."""
    full, ours, control = (pictures[name] for name in ("full", "fastercache", "steps_fastercache"))
    columns = {
        "full": full,
        "ours": ours,
        "fewer steps": control,
        f"ours, error x{GAIN}": difference(ours, full, GAIN),
        f"fewer, error x{GAIN}": difference(control, full, GAIN),
    }
    return sheet(columns, prompts, min(SHEET_ROWS, len(prompts)))


if __name__ == "__main__":
    with plain_errors():
        main()
