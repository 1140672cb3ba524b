"""How cached quantities are best predicted, at every second evaluation and with no tolerance.

"estimate" and "late": the difference between the branches, in place of the unconditional pass, from the start and from
a tenth of sampling on; beside fewer steps at that cost. "attention": attention outputs of both branches (all rows still
run). Prints the table and writes output/forecasts/summary.json.
"""

from benchmarks.tools.comparison import compare
from benchmarks.tools.intervals import cfg_cache
from benchmarks.tools.sampling import Run
from testbed.server import plain_errors


def attention(weight: str) -> Run:
    """A run that reuses attention outputs, extrapolated by `weight`."""
    inputs = {"preset": "none", "feature_reuse": weight, "reuse_depth": "attention"}
    return Run(f"attention_{weight}", (("FasterCache", inputs),))


RUNS = [
    Run("full"),
    *(cfg_cache(f"estimate_{f}", {"forecast": f}, 2) for f in ("hold", "linear", "quadratic", "blend", "fitted")),
    *(cfg_cache(f"late_{f}", {"forecast": f}, 2, 0.1) for f in ("hold", "linear", "fitted")),
    Run("fewer_steps", steps_of="estimate_linear"),
    *(attention(weight) for weight in ("hold", "constant", "ramp")),
]


if __name__ == "__main__":
    with plain_errors():
        compare("forecasts", RUNS)
