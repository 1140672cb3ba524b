"""What feature reuse does to pictures of a trained model."""

import pytest
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import chosen_by_node
from support.trained import Painter, decibels


@pytest.fixture(scope="module")
def painter():
    return Painter()


@pytest.mark.parametrize("depth", ["attention", "all blocks"])
def test_fp8_is_within_half_a_decibel_of_native_in_a_third_of_the_memory(painter, depth):
    full, found = painter.paint(painter.model), {}
    for dtype in ("native", "fp8"):
        model = attach(painter.model, chosen_by_node(forecast="fitted", depth=depth, dtype=dtype))
        found[dtype] = decibels(painter.paint(model), full), last_report(model)["run"]["features"]["bytes"]
    assert found["fp8"][0] > found["native"][0] - 0.5
    assert found["fp8"][1] < 0.34 * found["native"][1], "of a model that computes in fp32"


def test_the_automatic_depth_beats_fewer_steps_at_its_cost(painter):
    """All blocks but the first, at 12 of 30 evaluations: its counted cost is 0.71, that of 22 steps 0.73."""
    full = painter.paint(painter.model)
    model = attach(painter.model, chosen_by_node(forecast="fitted"))
    assert decibels(painter.paint(model), full) > decibels(painter.paint(painter.model, steps=22), full) + 3.0
    assert last_report(model)["run"]["features"]["depth"] == "all blocks"
    assert last_report(model)["totals"]["evaluations"]["reused"] >= 11
