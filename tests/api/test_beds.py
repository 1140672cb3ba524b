"""Every trained model is sampled by a running server as its bed says."""

import pytest

from benchmarks.tools.sampling import Bench, Run
from support.beds import skip_where_it_cannot_run
from testbed.beds import BEDS


@pytest.mark.parametrize("name", list(BEDS))
def test_a_bed_is_sampled_with_its_own_steps_and_guidance(host, name):
    skip_where_it_cannot_run(name)
    bed = BEDS[name]
    result = Bench(host, name).sample(Run("full", steps=min(bed.steps, 8), cfg=bed.cfg), bed.prompts("tuning")[:1])
    side = result.pictures.shape[2]
    assert result.pictures.shape == (1, bed.frames * side, side, 3)
    assert result.rows == min(bed.steps, 8) * (1 if bed.cfg == 1 else 2)
