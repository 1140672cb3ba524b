"""How cached quantities are best carried forward, at every second evaluation and with no gate.

"estimate" and "late": the difference between the branches, in place of the unconditional pass,
from the start and from a tenth of sampling on; beside fewer steps at that cost. "attention":
attention outputs of both branches (all rows still run). Prints the table and writes
output/forecasts/summary.json.
"""
from benchmarks.tools.comparison import compare
from benchmarks.tools.sampling import Run
from testbed.server import plain_errors

RUNS = [
    Run("full"),
    *(Run(f"estimate_{forecast}", (("FasterCacheCFG", {"tolerance": 0.0, "forecast": forecast}),))
      for forecast in ("hold", "linear", "quadratic", "blend", "measured")),
    *(Run(f"late_{forecast}", (("FasterCacheCFG", {"tolerance": 0.0, "forecast": forecast, "start_percent": 0.1}),))
      for forecast in ("hold", "linear", "measured")),
    Run("fewer_steps", steps_of="estimate_linear"),
    *(Run(f"attention_{weight}", (("FasterCache", {"preset": "none", "feature_reuse": weight,
                                                   "reuse_depth": "attention"}),))
      for weight in ("hold", "constant", "linear")),
]


if __name__ == "__main__":
    with plain_errors():
        compare("forecasts", RUNS)
