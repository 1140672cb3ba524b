"""Every preset of FasterCache beside fewer steps at its cost.

Prints the table and writes output/presets/summary.json.
"""

from benchmarks.tools.comparison import compare
from benchmarks.tools.sampling import PRESETS, Run
from testbed.server import plain_errors

RUNS = [
    Run("full"),
    *(Run(preset, (("FasterCache", {"preset": preset}),)) for preset in PRESETS),
    *(Run(f"steps_{preset}", steps_of=preset) for preset in PRESETS),
]


if __name__ == "__main__":
    with plain_errors():
        compare("presets", RUNS)
