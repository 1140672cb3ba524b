"""How cached quantities are best carried forward, at every second evaluation and with no gate.

"estimate" and "late": the difference between the branches, in place of the unconditional pass,
from the start and from a tenth of sampling on; beside fewer steps at that cost. "attention":
attention outputs of both branches (all rows still run). Prints the table and writes
output/forecasts/summary.json.
"""
import json

from benchmarks.tools.comparison import sample_all, summarise, table
from benchmarks.tools.sampling import Bench, Run
from testbed.server import ROOT, Host, plain_errors

RUNS = [
    Run("full"),
    *(Run(f"estimate_{forecast}", (("FasterCacheCFG", {"tolerance": 0.0, "forecast": forecast}),))
      for forecast in ("hold", "linear", "quadratic", "blend", "measured")),
    *(Run(f"late_{forecast}", (("FasterCacheCFG", {"tolerance": 0.0, "forecast": forecast, "start_percent": 0.1}),))
      for forecast in ("hold", "linear", "measured")),
    Run("fewer_steps", steps_of="estimate_linear"),
    *(Run(f"attention_{weight}", (("FasterCache", {"preset": "none", "attention_reuse": weight}),))
      for weight in ("hold", "constant", "linear")),
]
OUTPUT = ROOT / "output" / "forecasts"


def main():
    """Run everything and write it down."""
    prompts = json.loads((ROOT / "testbed" / "prompts.json").read_text())["report"]
    with Host(threads=2) as host:
        summary = summarise(sample_all(Bench(host), RUNS, prompts))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=1))
    print(table(summary))


if __name__ == "__main__":
    with plain_errors():
        main()
