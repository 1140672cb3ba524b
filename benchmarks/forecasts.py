"""How the cached difference between the branches is best carried forward, at equal cost.

The unconditional pass is estimated at every second evaluation. Prints the table and writes
output/forecasts/summary.json.
"""
import json

from benchmarks.tools.comparison import sample_all, summarise, table
from benchmarks.tools.sampling import Bench, Run
from testbed.server import ROOT, Host, plain_errors

RUNS = [
    Run("full"),
    *(Run(forecast, (("FasterCacheCFG", {"interval": 2, "weights": "none", "forecast": forecast}),))
      for forecast in ("hold", "linear", "quadratic", "blend")),
    Run("fewer_steps", steps_of="linear"),
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
